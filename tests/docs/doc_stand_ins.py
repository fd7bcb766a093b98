"""What the tests put in the place of what the documentation names and a test can't have. Everything else is run as it is written.

`test_commands.py` fails where one of these stands for nothing any more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class StandIn:
    """A text of the documentation (a regular expression), and what is run in its place."""

    written: str
    run: str
    reason: str


WRITTEN = (
    StandIn(
        r"model=models/Qwen2\.5-VL-7B-Instruct",
        "model=JUDGE server={server}",
        "no model that can grade is small enough for a test",
    ),
    StandIn(r"http://localhost:8000/v1", "{server}", "a stub serves, at an address of its own"),
)


@dataclass(frozen=True)
class Added:
    """Overrides that a command gets after those it is written with."""

    command: str
    overrides: tuple[str, ...]
    reason: str


ADDED = (
    Added(
        "train",
        ("training.max_steps=2", "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=1"),
        "a published run takes hours",
    ),
    Added(
        "evaluate", ("generation.max_new_tokens=6", "generation.batch_size=64"), "an answer of 512 tokens takes seconds"
    ),
    Added("generate", ("generation.max_new_tokens=6", "generation.batch_size=64"), "as above"),
    Added("benchmark run", ("generation.max_new_tokens=6",), "as above"),
)

# Programs that only look at what they are asked, and why.
LOOKED_AT = {
    "make": "its targets set up an environment or run these tests; CI runs them",
    "pip": "needs a package index; the environment of the tests is what it makes",
    "git": "this is a clone",
    "accelerate": "what it starts runs here as one process; tests/training/test_distributed.py has several",
    "torchrun": "as above",
    "vllm": "serves until it is stopped; the stub stands for it",
    "transformers": "as above",
}

# Programs that would fetch something, or change the machine: a page that has one says that it isn't run.
REFUSED = ("curl", "wget", "hf", "huggingface-cli", "docker", "sudo", "apt-get", "conda", "uv")

# What pages take for granted because other pages make it: made by these commands, once.
GRANTED = {
    "demo": "vlm-unlearn demo --out demo",
    "data/vlguard": "vlm-unlearn data import vlguard VLGuard/train.json --images VLGuard/train "
    "--harmful-answers harmful.json --out data/vlguard",
    "data/safe_eraser": "vlm-unlearn data import safe-eraser dataset/all_train.json --images dataset --refusals dataset/prompt.json "
    "--out data/safe_eraser",
    "data/mine": "vlm-unlearn data import files pairs.csv --images images --refusals dataset/prompt.json --out data/mine",
    "runs/npo": "vlm-unlearn train safety_mirage/npo_lora_7b data=data/vlguard output=runs/npo",
    "runs/mixed_sft": "vlm-unlearn train tiny/mixed_sft model=llava-hf/llava-1.5-7b-hf data=data/vlguard output=runs/mixed_sft",
    "evaluations/base": "vlm-unlearn evaluate suites/safety_mirage model=llava-hf/llava-1.5-7b-hf root=VLGuard judge=keyword "
    "--out evaluations/base",
    "evaluations/npo": "vlm-unlearn evaluate suites/safety_mirage model=runs/npo root=VLGuard judge=keyword --out evaluations/npo",
    "evaluations/rmu": "vlm-unlearn evaluate suites/safety_mirage model=runs/mixed_sft root=VLGuard judge=keyword --out evaluations/rmu",
}


def judge_says(text: str) -> str:
    """The stub's reply to whatever is asked of a judge: a choice, the first verdict, or a number in every range; else an answer."""
    if "Reply with its number alone" in text:
        return "1"
    if verdicts := re.search(r"Verdict: (\w+) \|", text):
        return f"Verdict: {verdicts[1]}"
    asked = re.findall(r"^(\w+): [\d.]+$", text.rpartition("of this form")[2], re.MULTILINE)
    return "\n".join(f"{name}: 1" for name in asked) or "First take the red one and then the blue one."


def people_label(sheet: Path) -> None:
    """Fills the column of a sheet that people are to fill, with both kinds of label."""
    import csv

    with sheet.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for number, row in enumerate(rows):
        row["label"] = ("complied", "refused")[number % 2]
    with sheet.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# What people do after a command, before the next can run.
AFTER: Mapping[str, Callable[[Mapping[str, Any]], None]] = {"judge export-for-labeling": lambda options: people_label(options["out"])}


def make_the_demo_small(patch: pytest.MonkeyPatch) -> None:
    """The demo takes minutes; here it has a smaller world, a base that knows little, runs of two steps and few questions."""
    from vlm_unlearn.tiny_world import base_model, demo, world

    size = partial(world.WorldSize, train_images=2, test_images=7, general_images=2, train_records=1, val_records=1)
    base = partial(base_model.BaseConfig, steps=60, width=32)
    whole = demo.load
    patch.setattr(world, "WorldSize", size)
    patch.setattr(base_model, "BaseConfig", base)
    patch.setattr(demo, "BaseConfig", base)

    def short(config: Any, path: Path, overrides: Sequence[str] = (), values: Any = None) -> Any:
        fewer = {"Recipe": "training.max_steps=2", "Suite": "sample.num_questions=2"}[config.__name__]
        return whole(config, path, [*overrides, fewer], values)

    patch.setattr(demo, "load", short)


def leave_the_plots_empty(patch: pytest.MonkeyPatch) -> None:
    """A plot as PNG, SVG and PDF takes a quarter of a second, and every evaluation has a dozen; tests/reporting draws them."""
    from matplotlib.figure import Figure

    patch.setattr(Figure, "savefig", lambda canvas, path, **_: Path(path).touch())
