"""``vlm-unlearn train`` and ``vlm-unlearn methods``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, quiet_libraries, status_console

if TYPE_CHECKING:
    from vlm_unlearn.methods import Method
    from vlm_unlearn.training.planning import Plan


def train(
    recipe_file: Path = typer.Argument(..., metavar="RECIPE.yaml", help="A recipe, or the name of a shipped one such as tiny/npo."),
    overrides: list[str] = typer.Argument(None, metavar="[key=value ...]", help="Dotted overrides, such as training.learning_rate=1e-5."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Unlearns by a recipe. Run again after an interruption it goes on from the last checkpoint.

    Example:

      vlm-unlearn train safety_mirage/npo_lora_7b data=data/vlguard output=runs/npo
    """
    from vlm_unlearn.config import Recipe, load

    recipe = load(Recipe, recipe_file, overrides or [])
    with status_console().status("loading transformers"):
        from vlm_unlearn.training.planning import plan, recipe_name
        from vlm_unlearn.training.runner import run_plan

        quiet_libraries()
        planned = plan(recipe)
    _warn_of_refusals(planned)
    name = recipe_name(recipe)
    with Stages() as bars:

        def on_step(step: int, steps: int, parts: Mapping[str, float]) -> None:
            shown = (f"{key} {float(value):.4g}" for key, value in parts.items() if key not in ("epoch", "learning_rate", "grad_norm"))
            bars.update(name, step, steps, "  ".join(shown))

        model = run_plan(planned, on_step)
    if as_json:
        print_json({"name": name, "model": str(model), "log": str(recipe.output / "log.jsonl")})
    else:
        reference = planned.source or "none needed"
        typer.echo(f"{name}: trained model in {model} (reference values: {reference}; precision {planned.precision})")


def _warn_of_refusals(planned: Plan) -> None:
    """Unlearning refusals makes a model more harmful: most likely the harmful answers were not injected."""
    from vlm_unlearn.judging.keyword import corrected_refusal

    answers = [example.answer for example in planned.training_set.examples["forget"]]
    refusals = sum(corrected_refusal(answer) is not None for answer in answers)
    if planned.method.forgets_answers and 2 * refusals > len(answers):
        typer.echo(
            f"warning: {refusals} of {len(answers)} forget answers are refusals, and {planned.recipe.method.name} makes its model unlearn "
            f"them; import the set with --harmful-answers, or train mixed_sft",
            err=True,
        )


def methods(as_json: bool = JSON_OPTION) -> None:
    """Lists the unlearning methods, their sources and their options.

    Example:

      vlm-unlearn methods --json
    """
    from vlm_unlearn.methods import METHODS

    if as_json:
        print_json([{"name": name, "source": method.source, "options": _options(method)} for name, method in sorted(METHODS.items())])
        return
    for name, method in sorted(METHODS.items()):
        options = ", ".join(f"{key}={value}" for key, value in _options(method).items())
        typer.echo(f"{name:<12}{method.source}\n{'':<12}{options or 'no options'}")


def _options(method: type[Method]) -> dict[str, object]:
    return {key: field.default for key, field in method.options_type.model_fields.items()}
