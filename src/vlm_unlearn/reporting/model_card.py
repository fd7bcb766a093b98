"""Writes the model card (README.md) of an exported model from the files of its run and its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm_unlearn.config import Recipe, validate
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import METHODS
from vlm_unlearn.records import Summary
from vlm_unlearn.reporting.card_results import CardEvaluation, compare_with_base, model_index, read_evaluations
from vlm_unlearn.reporting.columns import columns
from vlm_unlearn.reporting.summaries import join_summaries
from vlm_unlearn.reporting.tables.markdown import escaped, markdown, markdown_table
from vlm_unlearn.reporting.tables.summary_tables import summary_tables
from vlm_unlearn.reporting.tables.table import Table, table_lines, text_columns
from vlm_unlearn.store import RunDirectory, package_versions, read_json

NOT_MEASURED = ["## Evaluation", "", "No evaluation yet: pass `--evaluation` to `vlm-unlearn export`.", ""]
INTENDED_USE = """\
## Intended use

This model is intended for research on unlearning and its limits. It can also be used where a model has to be safer than
its base, together with other safeguards and after tests on the questions of your users.

Do not use it as the only safeguard where a wrong or harmful answer causes damage. Do not use it as evidence that
knowledge has been removed from the weights.
"""
EVALUATED = (
    "- The model was evaluated with the questions and attacks above only. Other attacks or further training may "
    "recover the knowledge."
)
NOT_EVALUATED = "- No evaluation of this model's weights was provided, so the effect of the unlearning is unknown."
ONE_RUN = "- This is one training run with one seed. The intervals do not include the variation between training seeds."
EVALUATION_LIMITS = [
    "- A broken model can appear safe. Read the attack success rate together with the degenerate rate and the utility.",
    "- Judges make errors. Each rate is based on one judge. Failed verdicts are excluded and counted.",
    ONE_RUN,
]
QUANTIZED_BASE = (
    "- The adapters were trained on a 4-bit base and merged into a base in full precision, so answers differ from "
    "those during training."
)
# With exports of the tests' tiny models, from bases that the older release wrote. Their logits were equal.
TRIED_OLDER_RELEASE = "4.57.1"
TRIED_FAMILIES = (
    "LLaVA-1.5, LLaVA-NeXT, Pixtral, Mistral 3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Llama-3.2-Vision, Gemma 3, InternVL "
    "and InstructBLIP"
)
LOADING = """\
## How to load it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```

"""


def model_card(run: Path, evaluations: Sequence[Path] = (), license: str | None = None) -> str:
    """Returns a model card for the Hugging Face hub.

    Args:
        run: The folder of a training run.
        evaluations: Evaluation folders with a summary.json, of this model and of the models to compare it with. The
            results of this model go into the front matter, which the hub reads. The base's results give the changes.
        license: The license of the base model, for the front matter.

    Raises:
        UserError: `run` is not a training run, or an evaluation has no summary.
    """
    training = RunDirectory(run)
    if not training.exists():
        raise UserError("not a folder that `vlm-unlearn train` wrote.", code="run-not-found", file=run)
    manifest = training.read_manifest()
    if manifest["identity"].get("kind") != "train":
        raise UserError(
            "not a training run. Pass a folder that `vlm-unlearn train` wrote.", code="run-not-found", file=run
        )
    recipe = validate(Recipe, read_json(training.recipe_file), str(training.recipe_file)).model_dump(mode="json")
    results = read_evaluations(run, manifest["identity"].get("model"), recipe["model"], evaluations)
    summary = join_summaries(evaluations) if evaluations else None
    evaluated = any(result.subject == "this" and row.metrics for result in results for row in result.summary.rows)
    lines = [
        *_front_matter(recipe, results, license),
        *_introduction(recipe, evaluated),
        *(_evaluation(summary, results) if summary else NOT_MEASURED),
        "## Limitations",
        "",
        EVALUATED if evaluated else NOT_EVALUATED,
        *(EVALUATION_LIMITS if summary else [ONE_RUN]),
        *([QUANTIZED_BASE] if recipe["trainable"]["mode"] == "qlora" else []),
        *_training(recipe, manifest),
        LOADING,
        *_versions(),
    ]
    return "\n".join(lines)


def _is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def _front_matter(recipe: Mapping[str, Any], results: Sequence[CardEvaluation], license: str | None) -> list[str]:
    """Returns the YAML front matter that the hub reads."""
    method, base = recipe["method"]["name"], recipe["model"]
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    front |= {"license": license} if license else {}
    front |= {"tags": ["machine-unlearning", "safety", method], **({"base_model": base} if _is_hub_id(base) else {})}
    index = model_index(f"{Path(base).name}-{method}", results)
    front |= {"model-index": index} if index else {}
    return ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _introduction(recipe: Mapping[str, Any], evaluated: bool) -> list[str]:
    name, base = recipe["method"]["name"], recipe["model"]
    method = METHODS[name] if name in METHODS.built_in else None  # a report imports no code that a run names
    goal = "refuse" if method is not None and not method.unlearns else "unlearn harmful knowledge"
    source = f" ({method.source})" if method else ""
    decoupling = ["prompt decoupling"] if recipe["prompt_decouple_weight"] else []
    training = " and ".join([name, *decoupling, *(defense["name"] for defense in recipe.get("defense", []))])
    title = f"# {escaped(base if _is_hub_id(base) else Path(base).name)}, trained with {escaped(training)}"
    effect = "The evaluation below shows the effect." if evaluated else "The effect has not been evaluated."
    first = f"This vision-language model was trained to {goal} with {escaped(name)}{source}, using vlm-unlearn."
    return [title, "", f"{first} {effect}", "", INTENDED_USE]


def _evaluation(summary: Summary, results: Sequence[CardEvaluation]) -> list[str]:
    """Returns the rates of all models, and the changes from the base to this model."""
    subjects = {"base": "the base model", "this": "this model"}
    names = dict.fromkeys(
        f"{escaped(name)} is {subjects[result.subject]}."
        for result in results
        if result.subject in subjects
        for name in result.models
    )
    rates = summary_tables(summary).get("rates")
    changes = compare_with_base(results)
    return [
        *("## Evaluation", ""),
        *([" ".join(names), ""] if names else []),
        *([markdown(rates)] if rates else ["The evaluations have no metrics.", ""]),
        *(f"- {escaped(heading)}: {escaped(explanation)}." for _, heading, explanation in columns(summary.rows)),
        "",
        *(["### Changes from the base model", ""] if changes else []),
        *(
            markdown(summary_tables(change)["comparisons"]) if isinstance(change, Summary) else f"{change}\n"
            for change in changes
        ),
    ]


def _training(recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Returns the settings and digests that identify the training run."""
    identity = manifest["identity"]
    digests = {"base model": identity.get("model"), **dict(identity.get("data") or {})}
    return [
        *("", "## Training", ""),
        _key_value_table("setting", "value", _settings(recipe, manifest)),
        _key_value_table("input", "SHA-256", digests),
        "Package versions, time and memory are in `unlearning_manifest.json`.",
        "",
    ]


def _versions() -> list[str]:
    """Returns the lines about the versions that have written and loaded the export."""
    versions = package_versions()
    tried = ", ".join(
        f"{name} {versions[name]}" for name in ("transformers", "torch", "safetensors") if name in versions
    )
    return [
        f"The export was written with {tried}, which also loaded its processor.",
        "",
        f"transformers {TRIED_OLDER_RELEASE} was tried with exports of tiny models of {TRIED_FAMILIES}. Their logits "
        "were equal if the files of the base model came from transformers 4, as those of most models on the hub. Other "
        "families gave other logits or were not tried.",
        "",
        "vLLM was not tried. `preprocessor_config.json`, the tokenizer files and older keys of config.json are "
        "included for it and for transformers 4.",
        "",
    ]


def _key_value_table(left: str, right: str, values: Mapping[str, object]) -> str:
    table_columns = text_columns(left, right)
    lines = table_lines(table_columns, [(key, str(value)) for key, value in values.items()])
    return markdown_table(Table(left, "", table_columns, lines))


def _settings(recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, object]:
    """Returns the settings that determine the weights, from the recipe and the manifest of the finished run."""
    method, identity, training = recipe["method"], manifest["identity"], recipe["training"]
    decoupling, projector = recipe["prompt_decouple_weight"], recipe["trainable"]["projector"]
    batch = f"{training['per_device_train_batch_size']} x {training['gradient_accumulation_steps']}"
    return {
        "method": method["name"],
        **{key: value for key, value in method.items() if key != "name"},
        **({"prompt decouple weight": decoupling} if decoupling else {}),
        **{
            f"defense {defense['name']}": ", ".join(f"{key}={value}" for key, value in defense.items() if key != "name")
            or "default options"
            for defense in recipe.get("defense", [])
        },
        "trainable parameters": recipe["trainable"]["mode"],
        **({} if training["max_steps"] else {"epochs": training["num_train_epochs"]}),
        "projector": "W + sin(dW), merged" if projector == "sine" else projector,
        "optimizer steps": manifest.get("steps", "unknown"),
        **({"stopped by the probe": manifest["stopped"]} if manifest.get("stopped") else {}),
        "learning rate": training["learning_rate"],
        "batch": f"{batch} x {identity.get('processes', '?')} process(es)",
        "seed": training["seed"],
        "precision": identity.get("precision", "unknown"),
    }
