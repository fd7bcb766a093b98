"""Picks sample prompts to show, with each model's answer and verdict beside the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_unlearn.data.images import open_image, png_url, resolve_image
from vlm_unlearn.evaluation.generating import saved_suite
from vlm_unlearn.records import Kind, Prompt, Response, Verdict
from vlm_unlearn.store import read_records

THUMBNAIL = 160  # pixels
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Answer:
    model: str
    text: str
    label: str  # a label, or "failed"


@dataclass(frozen=True)
class Sample:
    case: str
    kind: Kind
    question: str
    image: str | None  # a data: URL
    answers: Sequence[Answer]


def collect_samples(runs: Mapping[str, Path], per_case: int = 4) -> list[Sample]:
    """The first groups of every case, spread over its length, with the answers of all runs that were asked them.

    Args:
        runs: evaluation folder of each model, all of the same prompts.
    """
    first = next(iter(runs.values()))
    suite = saved_suite(first)
    roots = {case.name: case.images for case in suite.cases}
    prompts = list(read_records(first / "prompts.jsonl", Prompt))
    answers = {model: _answers(model, folder) for model, folder in runs.items()}
    samples = []
    for case in roots:
        of_case = [prompt for prompt in prompts if prompt.set == case and prompt.shot == 0]
        for prompt in of_case[:: max(1, len(of_case) // per_case)][:per_case]:
            shown = [answers[model][prompt.id] for model in runs if prompt.id in answers[model]]
            samples.append(Sample(case, prompt.kind, prompt.question, _thumbnail(prompt, roots[case]), shown))
    return samples


def _answers(model: str, folder: Path) -> dict[str, Answer]:
    """Answers with the labels that the run's own judge gave, those that its rates are made of."""
    file = folder / f"verdicts-{saved_suite(folder).judge.title}.jsonl"
    labels = {verdict.key: verdict.label or "failed" for verdict in read_records(file, Verdict)} if file.exists() else {}
    return {
        response.prompt_id: Answer(model, (response.text or response.error or "")[:SHOWN_CHARACTERS], labels.get(response.key, "failed"))
        for response in read_records(folder / "responses.jsonl", Response)
        if response.sample == 0
    }


def _thumbnail(prompt: Prompt, root: Path) -> str | None:
    if prompt.image is None:
        return None
    image = open_image(resolve_image(root, prompt.image, f'prompt "{prompt.id}"'))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return png_url(image)
