"""Time of importing 30,000 answers of other programs, and of grading them by keyword.

    python benchmarks/import_answers.py

Writes the questions of 10,000 records with three rewrites each, 1,000 images, and answers of 20 to 150 words in the
layout of each answer format. Then it runs `vlm-unlearn import-answers` and `vlm-unlearn judge run judge=keyword` as
commands, and writes benchmarks/results/import_answers.json. The processor time is that of both commands with their
start. On a machine that is busy with other work, the wall time is longer.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "import_answers.json"
RECORDS, REWRITES, IMAGES = 10_000, 3, 1_000
TEXT = (
    "the image shows a small red box near a table with many things and people who walk along the street in the morning "
    "light while two dogs play next to an old house that has green windows and nobody looks at them"
)
SUITE = """
splits:
  - {name: unsafe, format: vlguard, file: what.json, images: images, kind: unsafe}
judge: keyword
metrics:
  asr: {splits: [unsafe], labels: [complied], aggregate: any_per_question}
"""
ERASER_SUITE = """
splits:
  - {name: unsafe, format: safe_eraser, file: eraser.json, images: ., kind: unsafe, samples: 3}
judge: keyword
generation: {temperature: 1.0}
metrics:
  asr: {splits: [unsafe], labels: [complied], aggregate: any_per_question}
"""


def answer(rng: random.Random) -> str:
    """Returns an answer. Two of five decline."""
    words = TEXT.split()
    text = " ".join(rng.choice(words) for _ in range(rng.randint(20, 150))).capitalize() + "."
    return f"I'm sorry, but I cannot assist with that request. {text[:80]}" if rng.random() < 0.4 else text


def write_data(folder: Path) -> list[dict[str, Any]]:
    """Writes the data files and suites, and returns a row per answer with everything that a layout needs."""
    from PIL import Image

    rng = random.Random(0)
    for number in range(IMAGES):
        image = folder / "images" / "a" / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(image)
    records, rows = [], []
    for number in range(RECORDS):
        for rewrite in range(REWRITES):
            image = f"a/{number % IMAGES}.png"
            question = f"What is thing {number} in wording {rewrite}?"
            pair = {"instruction": question, "response": "I cannot help with that."}
            records.append({"id": f"Ads_{number}", "image": image, "safe": False, "instr-resp": [pair]})
            key = f"Ads_{number}_{rewrite}" if rewrite else f"Ads_{number}"
            rows.append({"key": key, "image": image, "question": question, "text": answer(rng)})
    (folder / "what.json").write_text(json.dumps(records))
    (folder / "suite.yaml").write_text(SUITE)
    eraser = [
        {
            "image_path": f"images/{rows[REWRITES * number]['image']}",
            "SDImage_path": "images/a/0.png",
            "unsafe_pairs": [{"question": f"What is thing {number}?", "model_response": "So.", "sd_response": "So."}],
        }
        for number in range(RECORDS)
    ]
    (folder / "eraser.json").write_text(json.dumps(eraser))
    (folder / "eraser_suite.yaml").write_text(ERASER_SUITE)
    return rows


def write_layouts(folder: Path, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Writes the answers in each layout, and yields the format, the file and the suite."""
    (folder / "npo.json").write_text(json.dumps({row["key"]: row["text"] for row in rows}, indent=4))
    yield "vlguard_eval", "unsafe=npo.json", "suite.yaml"
    records = json.loads((folder / "eraser.json").read_text())
    for number, record in enumerate(records):
        texts = [row["text"] for row in rows[REWRITES * number : REWRITES * (number + 1)]]
        del record["unsafe_pairs"][0]["model_response"]
        record["unsafe_pairs"][0] |= {f"model_response{sample}": text for sample, text in enumerate(texts, start=1)}
    (folder / "predictions.json").write_text(json.dumps(records, indent=4))
    yield "safe_eraser", "predictions.json", "eraser_suite.yaml"
    with (folder / "samples.jsonl").open("w") as handle:
        for number, row in enumerate(rows):
            media = [f"/data/{row['image']}"]
            line = {"doc_id": number, "input": row["question"], "filtered_resps": row["text"], "input_media": media}
            handle.write(json.dumps(line) + "\n")
    yield "lmms_eval", "samples.jsonl", "suite.yaml"
    with (folder / "m.tsv").open("w", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writerow(["index", "image_path", "question", "prediction"])
        writer.writerows([number, row["image"], row["question"], row["text"]] for number, row in enumerate(rows))
    yield "vlmevalkit", "m.tsv", "suite.yaml"
    with (folder / "answers.jsonl").open("w") as handle:
        for row in rows:
            handle.write(json.dumps({name: row[name] for name in ("question", "image", "text")}) + "\n")
    yield "jsonl", "answers.jsonl", "suite.yaml"


def timed(folder: Path, *words: str) -> dict[str, float]:
    """Runs a command, and returns its wall time and its processor time in seconds."""
    started, earlier = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "vlm_unlearn.cli.main", *words]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = usage.ru_utime - earlier.ru_utime + usage.ru_stime - earlier.ru_stime
    return {"wall_seconds": round(time.monotonic() - started, 2), "processor_seconds": round(processor, 2)}


def main() -> None:
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else name)
        for format_name, file, suite in write_layouts(folder, write_data(folder)):
            options = ("--format", format_name, "--suite", suite, "--out", format_name)
            steps = {
                "import": timed(folder, "import-answers", file, "root=.", *options),
                "judge": timed(folder, "judge", "run", format_name, "judge=keyword"),
            }
            total = {kind: round(sum(step[kind] for step in steps.values()), 2) for kind in steps["import"]}
            results.append({"format": format_name, "answers": RECORDS * REWRITES, **steps, "total": total})
            print(f"{format_name:<14}{total['wall_seconds']:6.1f} s, processor {total['processor_seconds']:.1f} s")
    machine = {"processor": platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    RESULTS.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
