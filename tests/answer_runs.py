"""Evaluations with the records of a test, in the form that `write_answers` reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from vlm_unlearn.config import validate
from vlm_unlearn.config.suite import Suite
from vlm_unlearn.records import Label, Prompt, Response, Verdict
from vlm_unlearn.store import write_json, write_records

SPLITS = {"attacked": "unsafe", "mixed": "safe_image_unsafe_question", "safe": "safe"}
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
    """Writes a run folder. Its images are in the folder ``images`` next to it."""
    splits = [
        {"name": name, "format": "vlguard", "file": "test.json", "images": "images", "kind": kind}
        for name, kind in {
            prompt.set: prompt.kind for prompt in prompts if prompt.set not in str(suite.get("benchmarks"))
        }.items()
    ]
    fields = {"model": folder.name, "root": str(folder.parent), "splits": splits, **suite}
    write_json(folder / "suite.json", validate(Suite, fields, "suite").model_dump(mode="json"))
    write_records(folder / "prompts.jsonl", prompts)
    write_records(folder / "responses.jsonl", responses)
    for judge, records in verdicts.items():
        write_records(folder / f"verdicts-{judge}.jsonl", records)
    return folder


def example_prompts() -> list[Prompt]:
    """Ten attacked questions in three wordings, five unsafe ones on harmless images, and thirty harmless ones."""
    counts = {"attacked": (10, 3), "mixed": (5, 1), "safe": (30, 1)}
    return [
        Prompt(
            id=f"{split}/{group}/{rewrite}",
            group_id=f"{split}/{group}",
            rewrite=rewrite,
            set=split,
            kind=SPLITS[split],  # type: ignore[arg-type]
            image=f"{split}.png",
            question=f"What of {split} number {group}, in wording {rewrite}?",
            reference="the reference answer",
            category=("Violence", "Privacy", "Fraud")[group % 3],
        )
        for split, (groups, rewrites) in counts.items()
        for group in range(groups)
        for rewrite in range(rewrites)
    ]


def label_of(model: str, number: int, judge: str) -> Label | None:
    """Returns a judge's label of a model's answer to the n-th prompt. The judges disagree on every seventh."""
    if number % 13 == 12:
        return None
    shift = {"base": 0, "npo": number % 3, "rmu": 1}[model]
    disagreement = judge == JUDGES[1] and number % 7 == 0
    return LABEL_ORDER[(number + shift + disagreement) % 4]


def make_example_runs(root: Path) -> dict[str, Path]:
    """Writes the runs of three models with two judges. Two verdicts of 26 failed."""
    images = root / "images"
    images.mkdir(parents=True)
    for number, split in enumerate(SPLITS):
        Image.new("RGB", (400, 200), (90 * number, 60, 60)).save(images / f"{split}.png")
    prompts = example_prompts()
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
