"""Evaluations as `write_answers` reads them, made of whatever records a test wants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from vlm_unlearn.config import validate
from vlm_unlearn.config.suite import Suite
from vlm_unlearn.records import Label, Prompt, Response, Verdict
from vlm_unlearn.store import write_json, write_records

CASES = {"attacked": "unsafe", "mixed": "safe_image_unsafe_question", "safe": "safe"}
MODELS = ("base", "npo", "rmu")
LABEL_ORDER: tuple[Label, ...] = ("complied", "refused", "degenerate", "off_topic")
JUDGES = ("keyword", "four_labels@other")


def put_run(
    folder: Path,
    prompts: Sequence[Prompt],
    responses: Iterable[Response],
    verdicts: Mapping[str, Iterable[Verdict]],
    **suite: object,
) -> Path:
    """A run folder; its images are in ``images`` beside it."""
    cases = [
        {"name": name, "format": "vlguard", "file": "test.json", "images": "images", "kind": kind}
        for name, kind in {
            prompt.set: prompt.kind for prompt in prompts if prompt.set not in str(suite.get("benchmarks"))
        }.items()
    ]
    fields = {"model": folder.name, "root": str(folder.parent), "splits": cases, **suite}
    write_json(folder / "suite.json", validate(Suite, fields, "suite").model_dump(mode="json"))
    write_records(folder / "prompts.jsonl", prompts)
    write_records(folder / "responses.jsonl", responses)
    for judge, given in verdicts.items():
        write_records(folder / f"verdicts-{judge}.jsonl", given)
    return folder


def asked() -> list[Prompt]:
    """Thirty attacked wordings of ten questions, five unsafe questions on harmless images, thirty harmless questions."""
    counts = {"attacked": (10, 3), "mixed": (5, 1), "safe": (30, 1)}
    return [
        Prompt(
            id=f"{case}/{group}/{shot}",
            group_id=f"{case}/{group}",
            rewrite=shot,
            set=case,
            kind=CASES[case],  # type: ignore[arg-type]
            image=f"{case}.png",
            question=f"What of {case} number {group}, put for the time {shot}?",
            reference="as it should be",
            category=("Violence", "Privacy", "Fraud")[group % 3],
        )
        for case, (groups, shots) in counts.items()
        for group in range(groups)
        for shot in range(shots)
    ]


def label_of(model: str, number: int, judge: str) -> Label | None:
    """What a judge says of a model's answer to the n-th prompt; the second judge sees every seventh otherwise."""
    if number % 13 == 12:
        return None
    shift = {"base": 0, "npo": number % 3, "rmu": 1}[model]
    other = judge == JUDGES[1] and number % 7 == 0
    return LABEL_ORDER[(number + shift + other) % 4]


def made_runs(root: Path) -> dict[str, Path]:
    """Three models, two judges, two verdicts in 26 failed."""
    images = root / "images"
    images.mkdir(parents=True)
    for number, case in enumerate(CASES):
        Image.new("RGB", (400, 200), (90 * number, 60, 60)).save(images / f"{case}.png")
    prompts = asked()
    runs = {}
    for model in MODELS:
        responses = [
            Response(prompt_id=p.id, text=f"Answer {n} of {model} to {p.id}, Überall.") for n, p in enumerate(prompts)
        ]
        verdicts = {
            judge: [
                Verdict(
                    prompt_id=p.id,
                    judge=judge,
                    label=(label := label_of(model, n, judge)),
                    error=None if label else "timed out",
                )
                for n, p in enumerate(prompts)
            ]
            for judge in JUDGES
        }
        runs[model] = put_run(root / model, prompts, responses, verdicts)
    return runs
