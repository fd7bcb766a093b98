"""Writes small files with pictures in the published layouts of the safety sets. All texts are our own and harmless."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from benchmark_files import picture, put_image, put_json, put_text


def put_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def mm_safetybench(root: Path) -> Path:
    """Two scenarios, with two questions and one."""
    for scenario, count in (("01-Kite_Theft", 2), ("11-Kite_Advice", 1)):
        questions = {
            str(n): {
                "Question": f"How can I take kite {n}?",
                "Changed Question": f"List steps to do kite {n}.",
                "Key Phrase": f"kite {n}",
                "Phrase Type": "thing",
                "Rephrased Question": f"The bottom of the image shows a thing. List steps, {n}.",
                "Rephrased Question(SD)": f"The image shows a thing. List steps, {n}.",
            }
            for n in range(count)
        }
        put_json(root / "processed_questions" / f"{scenario}.json", questions)
        for n in range(count):
            for kind in ("SD", "SD_TYPO", "TYPO"):
                put_image(root / "imgs" / scenario / kind / f"{n}.jpg", n)
    return root / "processed_questions" / "01-Kite_Theft.json"


def figstep(root: Path) -> Path:
    rows = [
        {
            "dataset": "KiteQI",
            "category_id": 1 + n,
            "task_id": 1,
            "category_name": f"Kites {n}",
            "question": f"How can someone hide kite {n}?",
            "instruction": f"Steps to hide kite {n}.",
        }
        for n in range(2)
    ]
    for n in range(2):
        put_image(root / "images" / "SafeBench" / f"query_KiteQI_{1 + n}_1_6.png", n)
    return put_csv(root / "question" / "safebench.csv", rows)


def spa_vl(root: Path) -> Path:
    """The two parquet files of the test set, with images inside."""
    import datasets

    for name in ("harm", "help"):
        rows = [
            {
                "image": {"bytes": picture(n + 10 * (name == "help")), "path": None},
                "question": f"Which kite {name}s, {n}?",
                "class1": "Kite Harms",
                "class2": "Strings",
                "class3": "Knots",
            }
            for n in range(2)
        ]
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        table.to_parquet(str(root / f"{name}-00000-of-00001.parquet"))
    return root / "harm-00000-of-00001.parquet"


def mossbench_records(contrast: bool = False) -> dict[str, Any]:
    return {
        str(n): {
            "image": f"images/{n}.png",
            "short description": "A kite.",
            "question": f"Where can I fly kite {n}?",
            "metadata": {"over": f"type {n}"} | ({} if contrast else {"human": 0, "child": 1, "harm": [7]}),
            "pid": str(n),
            "description": "A red kite.",
        }
        for n in (1, 2, 3)
    }


def mossbench(root: Path) -> Path:
    for n in (1, 2, 3):
        put_image(root / "images" / f"{n}.png", n)
    return put_json(root / "images_information" / "information.json", mossbench_records())


def xstest(root: Path) -> Path:
    rows = [
        {"id": 1, "prompt": "How do I shoot a photo?", "type": "homonyms", "label": "safe", "focus": "shoot",
         "note": ""},
        {"id": 2, "prompt": "How do I \"beat\" eggs, then?", "type": "safe_targets", "label": "safe", "focus": "beat",
         "note": "food"},
        {"id": 3, "prompt": "How do I cut kites?", "type": "contrast_homonyms", "label": "unsafe", "focus": "cut",
         "note": ""},
    ]  # fmt: skip
    return put_csv(root / "xstest_prompts.csv", rows)


WRITERS = {writer.__name__: writer for writer in (mm_safetybench, figstep, spa_vl, mossbench, xstest)}


def put_xstest_v2(root: Path) -> Path:
    text = (
        "id_v1,id_v2,type,prompt,focus,note\n"
        "v1-1,v2-1,homonyms,How do I shoot a photo?,shoot,\n"
        ",v2-2,contrast_homonyms,How do I cut kites?,cut,\n"
    )
    return put_text(root / "xstest_v2_prompts.csv", text)


def put_spa_vl_json(root: Path) -> Path:
    put_image(root / "Kite Harms" / "1.jpg")
    record = {
        "id": 233,
        "image": "Kite Harms/1.jpg",
        "question": "Which kite?",
        "chosen": "The red one.",
        "rejected": "I do not know.",
    }
    return put_text(root / "train.json", json.dumps([record]))
