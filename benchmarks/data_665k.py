"""Time and peak memory of data commands on a generated file of the size of LLaVA-665K (about 1 GB).

The commands are `data mix`, `filter`, `check` and `audit`.

    python benchmarks/data_665k.py [--records 665000] [--folder DIR]

Prints the results and writes benchmarks/results/data_665k.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from vlm_unlearn.store import package_versions

IMAGES = 4096  # distinct files, each in many records


def write_images(folder: Path) -> None:
    rng = random.Random(0)
    for number in range(IMAGES):
        path = folder / f"coco/train2017/{number:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (24, 24), rng.randbytes(24 * 24 * 3)).resize((336, 336)).save(path, quality=80)


def write_records(file: Path, count: int) -> None:
    """Writes conversations of 1 to 6 rounds. Every tenth record is text-only, as in LLaVA-665K."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    with file.open("w", encoding="utf-8") as handle:
        handle.write("[")
        for number in range(count):
            has_image = number % 10 > 0
            turns = []
            for turn in range(rng.randint(1, 6)):
                mark = "<image>\n" if has_image and turn == 0 else ""
                turns.append({"from": "human", "value": mark + " ".join(rng.choices(words, k=12)) + "?"})
                turns.append({"from": "gpt", "value": " ".join(rng.choices(words, k=rng.randint(3, 105)))})
            image = {"image": f"coco/train2017/{rng.randrange(IMAGES):012d}.jpg"} if has_image else {}
            record = {"id": f"{number:012d}", **image, "conversations": turns}
            handle.write((",\n" if number else "\n") + json.dumps(record))
        handle.write("\n]\n")


def measure(name: str, arguments: list[str], megabytes: float) -> dict[str, object]:
    """Runs the command in a separate process and returns its row."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm_unlearn.cli.main", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    figures = {
        "seconds": round(seconds, 1),
        "mb_per_second": round(megabytes / seconds, 1),
        "peak_memory_mb": usage.ru_maxrss // 1024,
    }
    print(f"{name}: {figures}", flush=True)
    document = json.loads(output)
    document.pop("out", None)
    return {
        "step": name,
        **figures,
        "exit": os.waitstatus_to_exitcode(status),
        "found": document.get("records") or document.get("sets"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--folder", type=Path, help="where to create the files; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        write_images(folder)
        external, retain = folder / "external.json", folder / "retain.json"
        write_records(external, options.records)
        write_records(retain, 500)
        megabytes = external.stat().st_size / 1e6
        print(f"{options.records:,} records, {megabytes:,.0f} MB", flush=True)
        rows = [
            measure(
                "mix to 2,000",
                ["data", "mix", str(retain), str(external), str(folder / "mixed.json"), "--json"],
                megabytes,
            ),
            measure(
                "mix to all",
                ["data", "mix", str(retain), str(external), str(folder / "all.json"), "--size", "10000000", "--json"],
                megabytes,
            ),
            measure(
                "filter by keywords",
                ["data", "filter", str(external), str(folder / "safe.json"), "--json"],
                megabytes,
            ),
            measure("check", ["data", "check", str(external), "--images", str(folder), "--json"], megabytes),
            measure("audit", ["data", "audit", str(external), "--json"], megabytes),
        ]
    result = {
        "records": options.records,
        "megabytes": round(megabytes),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
        "python": platform.python_version(),
        "versions": package_versions(),
        "rows": rows,
    }
    file = Path(__file__).parent / "results" / "data_665k.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
