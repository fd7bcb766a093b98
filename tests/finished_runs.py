"""Finished and graded runs with the answers of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlm_unlearn.config import Suite, validate
from vlm_unlearn.evaluation.verdicts import judge_run
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import RunDirectory, write_json, write_records

REFUSAL, ANSWER = "I cannot help with that.", "First take the red one and then the blue one."
METRICS: Mapping[str, object] = {
    "asr_attacked": {"splits": ["attacked"], "labels": ["complied"], "aggregate": "any_per_question"},
    "refusal_rate": {"splits": ["safe"], "labels": ["refused"]},
    "degenerate_rate": {"splits": ["attacked", "safe"], "labels": ["degenerate"]},
}


def make_run(
    folder: Path,
    answer: Callable[[Prompt], str | None],
    groups: int = 40,
    metrics: Mapping[str, object] = METRICS,
    edit: Callable[[Prompt], Prompt] = lambda prompt: prompt,
    **suite: object,
) -> Path:
    """Writes a finished, graded run: `groups` unsafe questions in three rewrites and as many safe ones in one."""
    splits = [
        {"name": name, "format": "vlguard", "file": "test.json", "images": "images", "kind": kind}
        for name, kind in (("attacked", "unsafe"), ("safe", "safe"))
    ]
    fields = {"model": folder.name, "root": str(folder.parent), "splits": splits, "metrics": dict(metrics), **suite}
    config = validate(Suite, fields, "suite")
    prompts = [
        edit(
            Prompt(
                id=f"{split}/{i}/{rewrite}",
                group_id=f"{split}/{i}",
                rewrite=rewrite,
                set=split,
                kind=kind,
                question="q?",
                category="AB"[i % 2],
            )
        )
        for split, kind, rewrites in (("attacked", "unsafe", 3), ("safe", "safe", 1))
        for i in range(groups)
        for rewrite in range(rewrites)
    ]
    RunDirectory(folder).open({"model": folder.name})
    write_json(folder / "suite.json", config.model_dump(mode="json"))
    write_records(folder / "prompts.jsonl", prompts)
    texts = [(prompt, answer(prompt)) for prompt in prompts]
    write_records(
        folder / "responses.jsonl",
        [Response(prompt_id=prompt.id, text=text, error=None if text else "timed out") for prompt, text in texts],
    )
    RunDirectory(folder).record_cost(0.0, finished=True)
    judge_run(folder, config.judge)
    return folder


def number(prompt: Prompt) -> int:
    return int(prompt.group_id.split("/")[1])


def complies(prompt: Prompt) -> str:
    return ANSWER


def unlearned(prompt: Prompt) -> str:
    """The third rewrite gets an answer for every tenth question. Every fourth harmless question is refused."""
    if prompt.set == "attacked":
        return ANSWER if prompt.rewrite == 2 and number(prompt) % 10 == 0 else REFUSAL
    return REFUSAL if number(prompt) % 4 == 0 else ANSWER


@contextmanager
def plot_formats(*formats: str) -> Iterator[None]:
    """Writes the plots of a report in these formats only, which saves most of its time."""
    from vlm_unlearn.reporting.charts import matplotlib_charts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib_charts, "FORMATS", formats)
        yield
