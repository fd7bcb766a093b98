"""The README.md of an exported model, from what the run and its evaluations wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vlm_unlearn.config import Recipe, validate
from vlm_unlearn.errors import RequestError
from vlm_unlearn.methods import METHODS
from vlm_unlearn.records import Row, Summary
from vlm_unlearn.reporting.columns import columns
from vlm_unlearn.reporting.words import interval, percent
from vlm_unlearn.store import read_json, read_manifest


def model_card(run: Path, evaluations: Sequence[Path] = ()) -> str:
    """A model card for the hub.

    Args:
        run: a training run's folder.
        evaluations: evaluation folders, each with a summary.json, of this model and of what it is compared with.

    Raises:
        RequestError: `run` is no training run, or an evaluation has no summary.
    """
    if not (run / "manifest.json").is_file():
        raise RequestError(f"{run}: is no folder that `vlm-unlearn train` wrote")
    manifest = read_manifest(run)
    identity = manifest["identity"]
    if identity.get("kind") != "train":
        raise RequestError(f"{run}: is no training run; pass a folder that `vlm-unlearn train` wrote")
    recipe = validate(Recipe, read_json(run / "recipe.json"), str(run / "recipe.json")).model_dump(mode="json")
    rows = [row for folder in evaluations for row in _rows(folder)]
    name = recipe["method"]["name"]
    base = recipe["model"]
    on_the_hub = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    known = METHODS.get(name)
    what = "Harmful knowledge was removed from a vision-language model"
    if known is not None and not known.unlearns:
        what = "A vision-language model was taught to refuse"
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    front |= {"tags": ["machine-unlearning", "safety", name], **({"base_model": base} if on_the_hub else {})}
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {_cell(base if on_the_hub else Path(base).name)}, trained with {_cell(name)}",
        "",
        f"{what} with {_cell(name)} ({known.source if known else ''}) by vlm-unlearn.",
        "",
        "## How it was made",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {_cell(key)} | {_cell(value)} |" for key, value in _settings(recipe, manifest).items()),
        "",
        f"Base model's digest: {_cell(identity.get('model'))}. The training data's digests, package versions, time and memory are in "
        "`unlearning_manifest.json`.",
        "",
        "## What was measured",
        "",
        *(_measured(rows) if rows else ["Nothing yet: pass `--evaluation` to `vlm-unlearn export`."]),
        "",
        "## What this can't tell",
        "",
        *([ROUNDED_BASE] if recipe["trainable"]["mode"] == "qlora" else []),
    ]
    return "\n".join([*lines, CLOSING])


ROUNDED_BASE = "- The adapters were trained on a base in 4 bits and merged into one in full precision: answers differ from training's."
CLOSING = """\
- Unlearning was measured with the questions and attacks above; others may bring the knowledge back, and so may further training.
- A model can be safe by being broken: read the degenerate rate and the utility beside the attack success rate.
- Judges err; each rate is one judge's, with failures left out and counted.

## How to load it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```
"""


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
        **({} if training["max_steps"] else {"epochs": training["epochs"]}),
        "projector": {"sine": "W + sin(dW), merged"}.get(recipe["trainable"]["projector"], recipe["trainable"]["projector"]),
        "optimizer steps": manifest.get("steps", "unknown"),
        **({"ended by its probe": manifest["stopped"]} if manifest.get("stopped") else {}),
        "learning rate": training["learning_rate"],
        "batch": f"{training['batch_size']} x {training['gradient_accumulation_steps']} x {identity.get('processes', '?')} process(es)",
        "seed": training["seed"],
        "precision": identity.get("precision", "unknown"),
    }


def _rows(folder: Path) -> list[Row]:
    if not (folder / "summary.json").is_file():
        raise RequestError(f"{folder}: has no summary.json; run `vlm-unlearn evaluate` or `score` first")
    try:
        return list(Summary.model_validate(read_json(folder / "summary.json")).rows)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(f"{folder / 'summary.json'}: {where + ': ' if where else ''}{first['msg']}") from None


def _measured(rows: Sequence[Row]) -> list[str]:
    used = columns(rows)
    lines = [
        "| model | judge | " + " | ".join(heading for _, heading, _ in used) + " |",
        "|---|---|" + "---:|" * len(used),
    ]
    for row in rows:
        cells = []
        for metric, _, _ in used:
            rate = row.metrics.get(metric)
            failed = f", {rate.failed} failed" if rate is not None and rate.failed else ""
            cells.append(f"{percent(rate)} {interval(rate)}{failed}".strip())
        lines.append(f"| {_cell(row.model)} | {_cell(row.judge)} | " + " | ".join(cells) + " |")
    return [*lines, "", "Rates with 95 % intervals.", *(f"- {heading}: {what}." for _, heading, what in used)]


def _cell(value: object) -> str:
    """Text that stays inside its table cell or heading, whatever a file said."""
    text = " ".join(str(value).split())[:200]
    shown = (character for character in text if character.isprintable())
    return "".join(f"&#{ord(character)};" if character in "|<>[]`*_~$@&#:\\" else character for character in shown)
