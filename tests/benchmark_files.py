"""Writes small files with images in the official layouts of all benchmarks. No official content is copied."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(color: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (color, 90, 40)).save(buffer, format="PNG")
    return buffer.getvalue()


def encoded(color: int = 0) -> str:
    return base64.b64encode(picture(color)).decode("ascii")


def put_image(path: Path, color: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(color))


def put_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def put_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def put_lines(path: Path, values: list[dict[str, Any]]) -> Path:
    return put_text(path, "".join(json.dumps(value) + "\n" for value in values))


def put_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def answers(*texts: str) -> list[dict[str, str]]:
    return [{"answer": text} for text in texts]


def vqav2(root: Path) -> dict[str, Any]:
    annotations = [
        {"question_id": n, "image_id": 40 + n // 2, "answer_type": "number", "answers": answers(*["3"] * 9, "4")}
        for n in range(4)
    ]
    questions = [{"question_id": n, "image_id": 40 + n // 2, "question": f"how many in {n} ?"} for n in range(4)]
    put_json(root / "vqav2" / "answers.json", {"annotations": annotations})
    put_json(root / "vqav2" / "questions.json", {"data_subtype": "val2014", "questions": questions})
    for image in (40, 41):
        put_image(root / "coco" / f"COCO_val2014_{image:012d}.jpg")
    return {"annotations": "vqav2/answers.json", "questions": "vqav2/questions.json", "images": "coco"}


def textvqa(root: Path) -> dict[str, Any]:
    data = [
        {"question_id": n, "image_id": f"a{n}", "question": f"what does {n} say?", "answers": ["stop"] * 10}
        for n in range(2)
    ]
    put_json(root / "textvqa" / "val.json", {"data": data})
    put_json(root / "textvqa" / "ocr.json", {"data": [{"image_id": "a0", "ocr_tokens": ["STOP", "here"]}]})
    for n in range(2):
        put_image(root / "textvqa" / "train_images" / f"a{n}.jpg")
    return {"annotations": "textvqa/val.json", "images": "textvqa/train_images"}


def vizwiz(root: Path) -> dict[str, Any]:
    listed = [
        {"image": f"V_{n}.jpg", "question": f"What is {n}?", "answer_type": "other", "answers": answers(*["cup"] * 10)}
        for n in range(2)
    ]
    put_json(root / "vizwiz" / "val.json", listed)
    for n in range(2):
        put_image(root / "vizwiz" / "val" / f"V_{n}.jpg")
    return {"annotations": "vizwiz/val.json", "images": "vizwiz/val"}


def gqa(root: Path) -> dict[str, Any]:
    kinds = ("query", "verify", "query")
    questions = {
        f"20{n}": {"imageId": f"n{n}", "question": f"Is it {n}?", "answer": "yes", "types": {"structural": kinds[n]}}
        for n in range(3)
    }
    put_json(root / "gqa" / "testdev.json", questions)
    for n in range(3):
        put_image(root / "gqa" / "images" / f"n{n}.jpg")
    return {"annotations": "gqa/testdev.json", "images": "gqa/images"}


def scienceqa(root: Path) -> dict[str, Any]:
    with_image = {
        "question": "Which is 2?",
        "choices": ["1", "2"],
        "answer": 1,
        "hint": "Count.",
        "image": "image.png",
        "split": "test",
    }
    text_only = {
        "question": "Which is 3?",
        "choices": ["3", "4", "5"],
        "answer": 0,
        "hint": "",
        "image": None,
        "split": "test",
    }
    put_json(
        root / "scienceqa" / "problems.json", {"7": with_image, "8": text_only, "9": {**text_only, "split": "train"}}
    )
    put_json(root / "scienceqa" / "splits.json", {"train": ["9"], "test": ["7", "8"]})
    put_image(root / "scienceqa" / "images" / "test" / "7" / "image.png")
    return {
        "annotations": "scienceqa/problems.json",
        "questions": "scienceqa/splits.json",
        "images": "scienceqa/images",
    }


def pope(root: Path) -> dict[str, Any]:
    """Two files with two images each. Both have the same question ids and images."""
    files = []
    for name in ("random", "popular"):
        lines = [
            {
                "question_id": n + 1,
                "image": f"p{n // 2}.jpg",
                "text": f"Is there a {n} in the image?",
                "label": "no" if n % 2 else "yes",
            }
            for n in range(4)
        ]
        file = root / "pope" / f"coco_pope_{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.append(f"pope/{file.name}")
    for n in range(2):
        put_image(root / "coco" / f"p{n}.jpg")
    return {"annotations": files, "images": "coco"}


def mmvet(root: Path) -> dict[str, Any]:
    with_and = {
        "imagename": "v1_0.png",
        "question": "What is x?",
        "answer": "-1 <AND> -5",
        "capability": ["ocr", "math"],
    }
    with_or = {"imagename": "v1_1.png", "question": "What is d?", "answer": "1.25 <OR> 5/4", "capability": ["ocr"]}
    put_json(root / "mmvet" / "mm-vet.json", {"v1_0": with_and, "v1_1": with_or})
    for n in range(2):
        put_image(root / "mmvet" / "images" / f"v1_{n}.png")
    return {"annotations": "mmvet/mm-vet.json", "images": "mmvet/images"}


def mmbench_rows() -> list[dict[str, Any]]:
    """Question 5 with two orders of its options, and question 6 with a hint.

    The first row refers to the image of the second.
    """
    categories = {"category": "fine", "l2-category": "logic"}
    return [
        {
            "index": 1_000_005,
            "question": "Which?",
            "hint": "",
            "A": "y",
            "B": "x",
            "C": "",
            "D": "",
            "answer": "B",
            "image": "5",
            **categories,
        },
        {
            "index": 5,
            "question": "Which?",
            "hint": "nan",
            "A": "x",
            "B": "y",
            "C": "",
            "D": "",
            "answer": "A",
            "image": encoded(5),
            **categories,
        },
        {
            "index": 6,
            "question": "And?",
            "hint": "See.",
            "A": "p",
            "B": "q",
            "C": "r",
            "D": "nan",
            "answer": "C",
            "image": encoded(6),
            **categories,
        },
    ]


def mmbench(root: Path) -> dict[str, Any]:
    put_tsv(root / "mmbench" / "dev.tsv", mmbench_rows())
    return {"annotations": "mmbench/dev.tsv"}


def mmbench_cn(root: Path) -> dict[str, Any]:
    options = [{"question": "哪一个?", "A": "红色", "B": "蓝色"}, {"question": "哪一个?", "A": "蓝色", "B": "红色"}]
    rows = [
        {"index": 7 + n * 1_000_000, "hint": "", **options[n], "C": "", "D": "", "answer": "AB"[n], "category": "fine",
         "l2-category": "logic", "image": "7" if n else encoded(7)}
        for n in range(2)
    ]  # fmt: skip
    put_tsv(root / "mmbench_cn" / "dev.tsv", rows)
    return {"annotations": "mmbench_cn/dev.tsv"}


def mme(root: Path) -> dict[str, Any]:
    """One category with images next to their questions, and one with two folders."""
    release = root / "mme" / "MME_Benchmark_release_version"
    for image in ("a", "b"):
        put_image(release / "count" / f"{image}.jpg", ord(image))
        lines = [
            f"Are there 2 of {image}? Please answer yes or no.\tYes",
            f"Are there 9 of {image}?  Please answer yes or no.\tNo",
        ]
        put_text(release / "count" / f"{image}.txt", "\n".join(lines) + "\n\n")
    put_image(release / "scene" / "images" / "c.jpg")
    put_text(
        release / "scene" / "questions_answers_YN" / "c.txt",
        "Is it a kite? Please answer yes or no.\tNo\r\nIs it a kite on a hill? Please answer yes or no.\tYes\r\n",
    )
    return {"annotations": "mme/MME_Benchmark_release_version", "images": "mme/MME_Benchmark_release_version"}


def seedbench(root: Path) -> dict[str, Any]:
    choices = {f"choice_{letter}": f"{number} kites" for number, letter in enumerate("abcd", start=1)}
    questions = [
        {"answer": "B", "data_id": "11_22", "data_type": "image", "question_id": "101", "question_type_id": 5},
        {"answer": "D", "data_id": "33_44", "data_type": "image", "question_id": "102", "question_type_id": 1},
        {"answer": "A", "data_id": "v.mp4", "data_type": "video", "question_id": "v9", "question_type_id": 10},
    ]
    listed = [{**question, **choices, "question": f"How many in {n}?"} for n, question in enumerate(questions)]
    types = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    put_json(root / "seedbench" / "SEED-Bench.json", {"questions": listed, "question_type": types})
    for name in ("SEED-Bench-image/11_22", "SEED-Bench-image/33_44", "SEED-Bench-video-image/10_v9.png"):
        put_image(root / "seedbench" / name)
    return {"annotations": "seedbench/SEED-Bench.json", "images": "seedbench"}


def llava_bench(root: Path) -> dict[str, Any]:
    folder = root / "llava_bench"
    questions, contexts, references = [], [], []
    for n, category in enumerate(("conv", "detail", "complex")):
        image = f"00{n // 2 + 1}.jpg"
        questions.append({"question_id": n, "image": image, "text": f"What flies in {n}?", "category": category})
        references.append({"question_id": n, "prompt": f"What flies in {n}?", "text": "A kite.", "answer_id": f"r{n}"})
    for n in (1, 2):
        contexts.append({"id": f"00{n}", "image": f"00{n}.jpg", "caption": f"A kite over hill {n}."})
        put_image(folder / "images" / f"00{n}.jpg")
    put_lines(folder / "questions.jsonl", questions)
    put_lines(folder / "context.jsonl", contexts)
    put_lines(folder / "answers_gpt4.jsonl", references)
    return {
        "annotations": "llava_bench/questions.jsonl",
        "questions": "llava_bench/answers_gpt4.jsonl",
        "images": "llava_bench/images",
    }


def _qbench(root: Path, name: str, texts: list[str]) -> dict[str, Any]:
    question, yes, no, low, high = texts
    entries = [
        {"img_path": "k1.jpg", "question": question, "candidates": [yes, no], "correct_ans": no, "type": 0,
         "concern": 0},
        {"img_path": "k2.jpg", "question": question, "candidates": [low, high, yes], "correct_ans": low, "type": 2,
         "concern": 3},
    ]  # fmt: skip
    put_json(root / name / "dev.json", entries)
    for entry in entries:
        put_image(root / name / "images" / entry["img_path"])
    return {"annotations": f"{name}/dev.json", "images": f"{name}/images"}


def qbench(root: Path) -> dict[str, Any]:
    return _qbench(root, "qbench", ["Is the kite sharp?", "Yes", "No", "Low", "High"])


def qbench_zh(root: Path) -> dict[str, Any]:
    return _qbench(root, "qbench_zh", ["风筝清晰吗?", "是", "否", "低", "高"])


_BENCHMARKS = (vqav2, textvqa, vizwiz, gqa, scienceqa, pope, mmvet, mmbench, mmbench_cn, mme, seedbench, llava_bench)
WRITERS = {writer.__name__: writer for writer in (*_BENCHMARKS, qbench, qbench_zh)}
