"""Time to open and filter the page of all answers in Debian's Chromium.

    python benchmarks/report_browser.py

Creates runs of four models with 10,000 and with 40,000 answers of 500 characters, three judges and 200 photographs,
writes the page, opens it from disk in a headless browser, sets each filter, and writes
benchmarks/results/report_browser.json. The time of a filter is from the user's event to the frame after the page is
drawn. The slowest of five repetitions counts.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results" / "report_browser.json"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
MODELS = ("base", "mixed_sft", "npo", "rmu")
CHARACTERS = 500
PHOTOGRAPHS = 200
REPEATS = 5

# Sets a control like a user, then waits for the resulting page and the frame after it.
ACT = """async ([id, value]) => {
  const control = document.getElementById(id);
  const began = performance.now();
  const drawn = new Promise((done) =>
    addEventListener("hashchange", () => requestAnimationFrame(() => setTimeout(done)), { once: true }));
  if (control.type === "checkbox") control.checked = value; else control.value = value;
  control.dispatchEvent(new Event(control.type === "search" ? "input" : "change"));
  await drawn;
  document.body.getBoundingClientRect();
  return performance.now() - began;
}"""
FILTERS = {
    "one model": ("model", "2", "-1"),
    "one label": ("label", "1", "-1"),
    "another judge": ("judge", "1", "-1"),
    "one case": ("case", "1", "-1"),
    "one category": ("category", "3", "-1"),
    "changed from base": ("changed", True, False),
    "judges disagree": ("disagree", True, False),
    "search": ("q", "barn", ""),
    "search without a match": ("q", "no such words anywhere", ""),
    "most changed first": ("sort", "changed", ""),
}


def make_runs(root: Path, count: int) -> dict[str, Path]:
    """Writes run folders with `count` answers in total, like evaluations with three judges."""
    from PIL import Image

    from answer_runs import put_run
    from vlm_unlearn.records import LABELS, Prompt, Response, Verdict

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnoprstu", k=rng.randint(2, 11))) for _ in range(5000)] + ["barn"]
    (root / "images").mkdir(parents=True)
    for number in range(PHOTOGRAPHS):
        Image.effect_noise((640, 480), 60).convert("RGB").save(root / "images" / f"{number}.jpg")

    def text(characters: int) -> str:
        content = ""
        while len(content) < characters:
            content += rng.choice(words) + " "
        return content[:characters]

    kinds = ("unsafe", "safe", "safe_image_unsafe_question", "unsafe")
    prompts = [
        Prompt(
            id=f"case{n % 4}/{n // 12}/{n}",
            group_id=f"{n // 12}",
            rewrite=n // 4 % 3,
            set=f"case{n % 4}",
            kind=kinds[n % 4],  # type: ignore[arg-type]
            image=f"{n % PHOTOGRAPHS}.jpg",
            question=text(80) + "?",
            reference=text(60),
            category=f"category {n % 20}",
        )
        for n in range(count // len(MODELS))
    ]
    runs = {}
    for model in MODELS:
        verdicts = {
            judge: [
                Verdict(prompt_id=p.id, judge=judge, label=rng.choice(LABELS), raw=text(120) if "@" in judge else None)
                for p in prompts
            ]
            for judge in ("keyword", "four_labels@a--judge", "safety_mirage@a--judge")
        }
        runs[model] = put_run(
            root / model, prompts, [Response(prompt_id=p.id, text=text(CHARACTERS)) for p in prompts], verdicts
        )
    return runs


def timings(browser: Any, page_file: Path) -> Iterator[tuple[str, list[float]]]:
    """Yields each action on the page and its durations in milliseconds."""
    opened: list[float] = []
    durations: dict[str, list[float]] = {name: [] for name in FILTERS} | {"next page": []}
    for _ in range(REPEATS):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        began = time.monotonic()
        page.goto(page_file.as_uri(), wait_until="commit")
        page.wait_for_selector("article")
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        opened.append(1000 * (time.monotonic() - began))
        for name, (control, value, default) in FILTERS.items():
            durations[name].append(page.evaluate(ACT, [control, value]))
            page.evaluate(ACT, [control, default])
        page.evaluate("document.querySelector('[data-step=\"1\"]').id = 'next'")
        step = ACT.replace(
            'control.dispatchEvent(new Event(control.type === "search" ? "input" : "change"))', "control.click()"
        )
        durations["next page"].append(page.evaluate(step, ["next", ""]))
        page.close()
    yield "open", opened
    yield from durations.items()


def main() -> None:
    from playwright.sync_api import sync_playwright

    from vlm_unlearn.reporting.answers.answers_page import write_answers
    from vlm_unlearn.store import peak_memory_mb

    rows = []
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        os.environ["HOME"] = scratch
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
        ]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), headless=True, args=flags)
        for count in (10_000, 40_000):
            runs = make_runs(Path(scratch) / str(count), count)
            began = time.monotonic()
            file = write_answers(Path(scratch) / f"report-{count}", runs, f"{count:,} answers")
            seconds = time.monotonic() - began
            row: dict[str, Any] = {
                "answers": count,
                "write_seconds": round(seconds, 1),
                "page_mb": round(file.stat().st_size / 1e6, 1),
            }
            print(
                f"{count:,} answers: written in {seconds:.1f} s, {row['page_mb']} MB, peak memory {peak_memory_mb()} MB"
            )
            for name, milliseconds in timings(browser, file):
                row[name] = {"median_ms": round(median(milliseconds)), "slowest_ms": round(max(milliseconds))}
                print(f"  {name:<24}{row[name]['median_ms']:>6} ms, slowest {row[name]['slowest_ms']:>5} ms")
            rows.append(row)
        chromium = browser.version
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "chromium": chromium,
        "playwright": version("playwright"),
        "load": round(
            os.getloadavg()[0], 1
        ),  # the number of runnable processes; if it exceeds the cores, the times are longer
    }
    setting = {"models": len(MODELS), "judges": 3, "characters": CHARACTERS, "repeats": REPEATS}
    RESULTS.write_text(json.dumps({**setting, "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
