"""Stand-ins for resources of the documentation that a test does not have. Everything else is run as it is written.

`test_commands.py` fails if a stand-in is unused.
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
    """A text of the documentation (a regular expression), and its replacement."""

    written: str
    run: str
    reason: str


WRITTEN = (
    StandIn(
        r"model=models/Qwen2\.5-VL-7B-Instruct",
        "model=JUDGE server={server}",
        "a model that can grade is too large for a test",
    ),
    StandIn(r"http://localhost:8000/v1", "{server}", "a stub server has another address"),
)


@dataclass(frozen=True)
class Added:
    """Overrides that are appended to those of a command."""

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

# Programs that are replaced by a check of their arguments, and the reason.
CHECKED_ONLY = {
    "make": "its targets create an environment or run these tests; CI runs them",
    "pip": "needs a package index; the tests run in the environment that it creates",
    "git": "the tests run in a clone",
    "accelerate": "its module runs in one process; tests/training/test_distributed.py uses several",
    "torchrun": "as above",
    "vllm": "a server runs until it is stopped; the stub replaces it",
    "transformers": "as above",
}

# Programs that would download files or change the machine. Pages mark them as not run.
REFUSED = ("curl", "wget", "hf", "huggingface-cli", "docker", "sudo", "apt-get", "conda", "uv")

# Folders that pages assume because other pages create them, and the commands that create them once.
_IMPORT = "vlm-unlearn data import"
_EVALUATE = "vlm-unlearn evaluate suites/safety_mirage root=VLGuard judge=keyword"
GRANTED = {
    "demo": "vlm-unlearn demo --out demo",
    "data/vlguard": f"{_IMPORT} vlguard VLGuard/train.json --images VLGuard/train --harmful-answers harmful.json "
    "--out data/vlguard",
    "data/safe_eraser": f"{_IMPORT} safe-eraser dataset/all_train.json --images dataset "
    "--refusals dataset/prompt.json --out data/safe_eraser",
    "data/mine": f"{_IMPORT} files pairs.csv --images images --refusals dataset/prompt.json --out data/mine",
    "runs/npo": "vlm-unlearn train safety_mirage/npo_lora_7b data=data/vlguard output=runs/npo",
    "runs/mixed_sft": "vlm-unlearn train tiny/mixed_sft model=llava-hf/llava-1.5-7b-hf data=data/vlguard "
    "output=runs/mixed_sft",
    "evaluations/base": f"{_EVALUATE} model=llava-hf/llava-1.5-7b-hf --out evaluations/base",
    "evaluations/npo": f"{_EVALUATE} model=runs/npo --out evaluations/npo",
    "evaluations/rmu": f"{_EVALUATE} model=runs/mixed_sft --out evaluations/rmu",
}


def judge_reply(text: str) -> str:
    """Returns the stub's reply: a choice, the rubric's first verdict, a number in every range, or else an answer."""
    if "Reply with its number alone" in text:
        return "1"
    if verdicts := re.search(r"Verdict: (\w+) \|", text):
        return f"Verdict: {verdicts[1]}"
    scores = re.findall(r"^(\w+): [\d.]+$", text.rpartition("of this form")[2], re.MULTILINE)
    return "\n".join(f"{name}: 1" for name in scores) or "First take the red one and then the blue one."


def people_label(sheet: Path) -> None:
    """Fills the label column of an exported file with both labels."""
    import csv

    with sheet.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for number, row in enumerate(rows):
        row["label"] = ("complied", "refused")[number % 2]
    with sheet.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# Steps by people after a command, which the next command needs.
AFTER: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "judge export-for-labeling": lambda options: people_label(options["out"])
}


def make_the_demo_small(patch: pytest.MonkeyPatch) -> None:
    """Shrinks the demo: a smaller world, a base model with little training, runs of two steps and few questions."""
    from vlm_unlearn import worker_pool
    from vlm_unlearn.worlds.tiny import base_model, demo, robustness, world

    size = partial(world.WorldSize, train_images=2, test_images=7, general_images=2, train_records=1, val_records=1)
    base = partial(base_model.BaseConfig, steps=60, width=32)
    load = demo.load
    patch.setattr(world, "WorldSize", size)
    patch.setattr(base_model, "BaseConfig", base)
    patch.setattr(demo, "BaseConfig", base)
    patch.setattr(robustness, "BaseConfig", base)

    def short(config: Any, path: Path, overrides: Sequence[str] = (), values: Any = None) -> Any:
        fewer = {"Recipe": "training.max_steps=2", "Suite": "sample.num_questions=2"}[config.__name__]
        return load(config, path, [*overrides, fewer], values)

    patch.setattr(demo, "load", short)
    patch.setattr(worker_pool, "default_processes", lambda: 1)  # other processes would run the full demo


def leave_the_plots_empty(patch: pytest.MonkeyPatch) -> None:
    """Saves plots as empty drawings. Every evaluation has a dozen of 0.25 s each, and tests/reporting draws them."""
    from matplotlib.figure import Figure

    patch.setattr(Figure, "savefig", lambda canvas, path, **_: Path(path).write_text("<svg/>"))
