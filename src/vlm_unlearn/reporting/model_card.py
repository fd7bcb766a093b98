"""The README.md of an exported model, from what the run and its evaluations wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm_unlearn.config import Recipe, validate
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import METHODS
from vlm_unlearn.records import Summary
from vlm_unlearn.reporting.columns import columns
from vlm_unlearn.reporting.evaluated import Evaluated, changes, model_index, read_evaluated
from vlm_unlearn.reporting.summaries import join_summaries
from vlm_unlearn.reporting.tables.markdown import escaped, markdown, markdown_table
from vlm_unlearn.reporting.tables.summary_tables import summary_tables
from vlm_unlearn.reporting.tables.table import Table, text_cell, text_columns
from vlm_unlearn.store import read_json, read_manifest


def model_card(run: Path, evaluations: Sequence[Path] = (), license: str | None = None) -> str:
    """A model card for the hub.

    Args:
        run: a training run's folder.
        evaluations: evaluation folders, each with a summary.json, of this model and of what it is compared with. This model's results
            go into the front matter, for the hub to read; the base's give the changes.
        license: of the base model, for the front matter; we can't know it.

    Raises:
        UserError: `run` is no training run, or an evaluation has no summary.
    """
    if not (run / "manifest.json").is_file():
        raise UserError(f"{run}: is no folder that `vlm-unlearn train` wrote")
    manifest = read_manifest(run)
    if manifest["identity"].get("kind") != "train":
        raise UserError(f"{run}: is no training run; pass a folder that `vlm-unlearn train` wrote")
    recipe = validate(Recipe, read_json(run / "recipe.json"), str(run / "recipe.json")).model_dump(mode="json")
    found = read_evaluated(run, manifest["identity"].get("model"), recipe["model"], evaluations)
    summary = join_summaries(evaluations) if evaluations else None
    measured = any(one.role == "this" and row.metrics for one in found for row in one.summary.rows)
    lines = [
        *_front(recipe, found, license),
        *_opening(recipe, measured),
        *(_measured(summary, found) if summary else NOT_MEASURED),
        "## What this can't tell",
        "",
        MEASURED_SO_FAR if measured else UNMEASURED,
        *(CANT_TELL if summary else [ONE_RUN]),
        *([ROUNDED_BASE] if recipe["trainable"]["mode"] == "qlora" else []),
        *_made(recipe, manifest),
    ]
    return "\n".join([*lines, CLOSING])


NOT_MEASURED = ["## What was measured", "", "Nothing yet: pass `--evaluation` to `vlm-unlearn export`.", ""]
USE = """\
## What it is for

Research on unlearning and its limits, and models that have to be safer than their base, together with other safeguards and after tests on
the questions that your users ask.

It is not for use as the only safeguard, where a wrong or harmful answer does damage, nor as proof that knowledge is gone from the weights.
"""
MEASURED_SO_FAR = "- This model was measured with the questions and attacks above; others may bring the knowledge back, and so may further training."
UNMEASURED = "- Whether the knowledge is gone: no evaluation of this model's weights came with it."
ONE_RUN = "- It is one training run with one seed: another seed's model would give other numbers, beyond what intervals allow for."
CANT_TELL = [
    "- A model can be safe by being broken: read the degenerate rate and the utility beside the attack success rate.",
    "- Judges err; a judged rate is one judge's, with failures left out and counted.",
    ONE_RUN,
]
ROUNDED_BASE = "- The adapters were trained on a base in 4 bits and merged into one in full precision: answers differ from training's."
CLOSING = """\
## How to load it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```
"""


def _on_the_hub(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def _front(recipe: Mapping[str, Any], found: Sequence[Evaluated], license: str | None) -> list[str]:
    """The front matter that the hub reads."""
    method, base = recipe["method"]["name"], recipe["model"]
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    front |= {"license": license} if license else {}
    front |= {"tags": ["machine-unlearning", "safety", method], **({"base_model": base} if _on_the_hub(base) else {})}
    results = model_index(f"{Path(base).name}-{method}", found)
    front |= {"model-index": results} if results else {}
    return ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _opening(recipe: Mapping[str, Any], measured: bool) -> list[str]:
    name, base = recipe["method"]["name"], recipe["model"]
    known = METHODS.get(name)
    what = "A vision-language model was trained to unlearn harmful knowledge"
    if known is not None and not known.unlearns:
        what = "A vision-language model was trained to refuse"
    source = f" ({known.source})" if known else ""
    decoupled = " and prompt decoupling" if recipe["prompt_decouple_weight"] else ""
    title = f"# {escaped(base if _on_the_hub(base) else Path(base).name)}, trained with {escaped(name)}{decoupled}"
    how_far = f"How far that went: {'see below' if measured else 'nobody has measured it'}."
    return [title, "", f"{what} with {escaped(name)}{source} by vlm-unlearn. {how_far}", "", USE]


def _measured(summary: Summary, found: Sequence[Evaluated]) -> list[str]:
    """The rates of all models, and what changed from the base to this one."""
    used = columns(summary.rows)
    lines = ["## What was measured", ""]
    roles = {"base": "the base model, before", "this": "this model"}
    told = [f"{escaped(name)} is {roles[one.role]}" for one in found if one.role in roles for name in one.models]
    lines += [f"{'; '.join(dict.fromkeys(told))}.", ""] if told else []
    rates = summary_tables(summary).get("rates")
    lines += [markdown(rates)] if rates else ["Nothing: the evaluations have no metrics.", ""]
    lines += [*(f"- {escaped(heading)}: {escaped(what)}." for _, heading, what in used), ""]
    compared = changes(found)
    if compared:
        lines += ["### What changed", ""]
    for one in compared:
        lines += [markdown(summary_tables(one)["comparisons"])] if isinstance(one, Summary) else [one, ""]
    return lines


def _made(recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Settings and digests: what it takes to make it again."""
    identity = manifest["identity"]
    settings = {key: str(value) for key, value in _settings(recipe, manifest).items()}
    digests = {
        "base model": str(identity.get("model")),
        **{name: str(value) for name, value in dict(identity.get("data") or {}).items()},
    }
    return [
        "",
        "## How it was made",
        "",
        markdown_table(_pairs("setting", "value", settings)),
        markdown_table(_pairs("what went in", "SHA-256", digests)),
        "Package versions, time and memory are in `unlearning_manifest.json`.",
        "",
    ]


def _pairs(left: str, right: str, values: Mapping[str, str]) -> Table:
    return Table(left, "", text_columns(left, right), [[text_cell(left, key), text_cell(right, value)] for key, value in values.items()])


def _settings(recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, object]:
    """What decided the weights, out of the recipe and of how the run ended."""
    method, identity = recipe["method"], manifest["identity"]
    decoupled = recipe["prompt_decouple_weight"]
    training = recipe["training"]
    return {
        "method": method["name"],
        **{key: value for key, value in method.items() if key != "name"},
        **({"prompt decouple weight": decoupled} if decoupled else {}),
        "trained": recipe["trainable"]["mode"],
        **({} if training["max_steps"] else {"epochs": training["num_train_epochs"]}),
        "projector": {"sine": "W + sin(dW), merged"}.get(
            recipe["trainable"]["projector"], recipe["trainable"]["projector"]
        ),
        "optimizer steps": manifest.get("steps", "unknown"),
        **({"ended by its probe": manifest["stopped"]} if manifest.get("stopped") else {}),
        "learning rate": training["learning_rate"],
        "batch": f"{training['per_device_train_batch_size']} x {training['gradient_accumulation_steps']} x {identity.get('processes', '?')} process(es)",
        "seed": training["seed"],
        "precision": identity.get("precision", "unknown"),
    }
