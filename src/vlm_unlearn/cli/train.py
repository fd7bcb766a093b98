"""``vlm-unlearn train`` and ``vlm-unlearn methods``: unlearn by a recipe, and list the methods."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, quiet_libraries, status_console
from vlm_unlearn.cli.completion import recipe_keys, recipe_names
from vlm_unlearn.cli.image_folders import reads_images

if TYPE_CHECKING:
    from rich.table import Table

    from vlm_unlearn.config import Recipe
    from vlm_unlearn.methods import Method
    from vlm_unlearn.methods.wrappers import Defense
    from vlm_unlearn.plugins import Registry
    from vlm_unlearn.training.callbacks import Probe
    from vlm_unlearn.training.gradient_checkpointing import CheckpointingChoice
    from vlm_unlearn.training.inputs import Inputs
    from vlm_unlearn.training.plan import Plan
    from vlm_unlearn.training.preview import Preview


@reads_images
def train(
    recipe_file: Path = typer.Argument(
        ...,
        metavar="RECIPE.yaml",
        help="A recipe, or the name of a shipped one such as tiny/npo.",
        autocompletion=recipe_names,
    ),
    overrides: list[str] = typer.Argument(
        None,
        metavar="[key=value ...]",
        help="Dotted overrides, such as training.learning_rate=1e-5.",
        autocompletion=recipe_keys,
    ),
    plan_only: bool = typer.Option(
        False, "--plan", help="Print the trainable parameters, data, steps and memory of the run, and do not train."
    ),
    seeds: str = typer.Option(
        None,
        "--seeds",
        metavar="0,1,2",
        help="Train once with each seed, into seed-0, seed-1, ... below the output folder. A report of all of them has "
        "the mean and the spread.",
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Unlearns by a recipe. Run again after an interruption, it resumes from the last checkpoint.

    The exit code is 3 if a rule of the probe's abort_when has stopped the run.

    On several GPUs: accelerate launch --config_file recipes/engines/fsdp2.yaml -m vlm_unlearn.cli.main train ...

    Example:

      vlm-unlearn train tiny/npo model=... data=data/mine output=runs/npo --plan

      vlm-unlearn train safety_mirage/npo_lora_7b data=data/vlguard output=runs/npo

      vlm-unlearn train tiny/npo model=... data=data/mine output=runs/npo --seeds 0,1,2
    """
    from vlm_unlearn.config import Recipe, load, parse_seeds

    recipe = load(Recipe, recipe_file, overrides or [])
    recipes = [recipe] if seeds is None else [_with_seed(recipe, seed) for seed in parse_seeds(seeds)]
    is_main = os.environ.get("RANK", "0") == "0"  # of the processes that train together, only this one prints
    with status_console().status("loading transformers"):
        from vlm_unlearn.training.callbacks import was_aborted
        from vlm_unlearn.training.inputs import Inputs, SharedInputs
        from vlm_unlearn.training.plan import plan, recipe_name
        from vlm_unlearn.training.preview import preview
        from vlm_unlearn.training.runner import build_probe

        quiet_libraries()
        if plan_only:
            _print_preview(preview(recipe), as_json)
            return
        inputs = SharedInputs() if len(recipes) > 1 else Inputs()
        planned = plan(recipes[0], inputs)
        build_probe(planned)  # an invalid probe fails here
    if is_main:
        _warn_about_forget_answers(planned)
        _print_start(planned)
    results = []
    for seeded in recipes:
        name = recipe_name(seeded) if seeds is None else f"{recipe_name(seeded)}, seed {seeded.training.seed}"
        planned = plan(seeded, inputs)
        model = _run(planned, build_probe(planned), name, is_main, inputs)
        if is_main:
            results.append(_result(name, model, seeded.output))
    if is_main:
        if as_json:
            print_json(results[0] if seeds is None else {"runs": results})
        else:
            _print_results(results)
        if any(was_aborted(result["stopped"]) for result in results):
            raise typer.Exit(ABORTED_EXIT_CODE)


ABORTED_EXIT_CODE = 3  # a rule of `abort_when` has stopped the run


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    """Returns a recipe with another training seed, and an output folder for it."""
    training = recipe.training.model_copy(update={"seed": seed})
    return recipe.model_copy(update={"training": training, "output": recipe.output / f"seed-{seed}"})


def _run(planned: Plan, probe: Probe | None, name: str, is_main: bool, inputs: Inputs) -> Path:
    """Trains with a progress bar, and returns the model folder.

    Raises:
        RunError: The training failed. The main process has drawn the loss curves.
    """
    from vlm_unlearn.distributed import destroy_process_group
    from vlm_unlearn.errors import RunError
    from vlm_unlearn.reporting.charts.curves import NOT_A_LOSS, write_loss_png
    from vlm_unlearn.training.runner import run_plan

    with Stages() as stages:
        stages.wait("loading the model")

        def on_step(step: int, steps: int, terms: Mapping[str, float]) -> None:
            losses = (f"{key} {float(value):.4g}" for key, value in terms.items() if key not in NOT_A_LOSS)
            stages.update(name, step, steps, "  ".join(losses))

        def on_reference(done: int, total: int) -> None:
            stages.update("reference values", done, total)

        def on_checkpointing(choice: CheckpointingChoice) -> None:
            status_console().print(str(choice), markup=False, highlight=False)

        try:
            with redirect_stdout(sys.stderr):  # trackio and others print, but standard output is for the result
                model = run_plan(planned, on_step, probe, on_reference, inputs, on_checkpointing=on_checkpointing)
            destroy_process_group()
        except RunError:
            if is_main:
                write_loss_png(planned.recipe.output)
            raise
    return model


def _result(name: str, model: Path, output: Path) -> dict[str, str | None]:
    """Returns the document of ``--json`` for a run. Draws its loss curves."""
    from vlm_unlearn.reporting.charts.curves import write_loss_png
    from vlm_unlearn.store import RunDirectory

    run = RunDirectory(output)
    curves, stopped = write_loss_png(output), run.read_manifest().get("stopped")
    return {
        "name": name,
        "model": str(model),
        "log": str(run.log_file),
        "loss": str(curves) if curves else None,
        "stopped": stopped,
    }


def _print_results(results: Sequence[Mapping[str, str | None]]) -> None:
    for result in results:
        reason = f"; stopped by the probe: {result['stopped']}" if result["stopped"] else ""
        typer.echo(f"{result['name']}: trained model in {result['model']}; loss curves: {result['loss']}{reason}")
    if len(results) > 1:
        folder = Path(str(results[0]["model"])).parent.parent
        typer.echo(f"evaluate all of them: vlm-unlearn evaluate SUITE 'model={folder}/seed-*' --out DIR")


def _print_start(planned: Plan) -> None:
    """Prints the trainable parameters, the source of the reference values, and whether prefix sharing is on."""
    console = status_console()
    console.print(_trainable_table(planned.trainable))
    for line in (
        f"reference values: {planned.reference_strategy or 'none needed'}; precision {planned.precision}"
        + _threads_text(planned.threads),
        _prefix_sharing_line(planned.prefix_sharing_unsupported_reason),
    ):
        console.print(line, markup=False, highlight=False)


def _threads_text(threads: int | None) -> str:
    import torch

    if threads is None:
        return ""
    chosen = " (for a small model; OMP_NUM_THREADS sets another number)" if threads < torch.get_num_threads() else ""
    return f"; {threads} CPU thread{'' if threads == 1 else 's'}{chosen}"


def _prefix_sharing_line(unsupported_reason: str | None) -> str:
    return (
        "prefix sharing: on, each image runs once for all of its questions in a batch"
        if unsupported_reason is None
        else f"prefix sharing: off ({unsupported_reason})"
    )


def _trainable_table(rows: list[tuple[str, int, int]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("component", "trained", "of", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for component, trained, total in rows:
        table.add_row(component, f"{trained:,}", f"{total:,}")
    return table


def _print_preview(result: Preview, as_json: bool) -> None:
    from rich.console import Console

    from vlm_unlearn.training.estimate import GIB

    memory = {key: round(value / GIB, 2) for key, value in asdict(result.memory).items()}
    memory["total"] = round(result.memory.total / GIB, 2)
    gpus = {f"{size} GB": result.memory.devices(size * 1e9) for size in (24, 48, 80)}
    if as_json:
        trainable = [
            {"part": name, "trained": trained, "parameters": total} for name, trained, total in result.trainable
        ]
        print_json({**asdict(result), "trainable": trainable, "memory": memory, "gpus": gpus})
        return
    console = Console()
    estimated = f"estimated memory in GiB{' with gradient checkpointing' if result.memory_with_checkpointing else ''}"
    examples = ", ".join(f"{role} {count:,}" for role, count in result.examples.items())
    lengths = ", ".join(f"{role} {count:g}" for role, count in result.tokens_per_sample.items())
    needed = ", ".join(f"{count} of {size}" if count else f"too small: {size}" for size, count in gpus.items())
    for line in (
        f"{result.name}: {result.model}" + ("" if result.model_found else " (not on this machine; its shape is known)"),
        f"examples: {examples}",
        f"steps: {result.steps:,} of {result.samples_per_step:,} forget samples on {result.processes} process(es); "
        f"{result.tokens:,} tokens in total (per sample: {lengths})",
        f"reference values: {result.reference or 'none needed'}; precision {result.precision}"
        + _threads_text(result.threads),
        _prefix_sharing_line(result.prefix_sharing_unsupported_reason),
        str(result.gradient_checkpointing),
        f"{estimated}: " + ", ".join(f"{key} {value:g}" for key, value in memory.items()),
        f"GPUs with sharded states (FSDP2 or ZeRO-3): {needed}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_trainable_table(result.trainable))


def _warn_about_forget_answers(planned: Plan) -> None:
    """Warns if a method trains the model to give forget answers that are not refusals."""
    from vlm_unlearn.judging.keyword import corrected_refusal

    if planned.method.unlearns or planned.method.forget_target != "original":
        return
    answers = [example.answer for example in planned.training_set["forget"]]
    refusals = sum(corrected_refusal(answer) is not None for answer in answers)
    if 2 * refusals < len(answers):
        typer.echo(
            f"warning: {len(answers) - refusals} of {len(answers)} forget answers are not refusals, and "
            f"{planned.recipe.method.name} trains the model to give them; import the set without --harmful-answers, "
            "or unlearn it (npo, rmu, ...)",
            err=True,
        )


def methods(
    defenses: bool = typer.Option(
        False, "--defenses", help="List the defenses against relearning instead, which wrap any method."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Lists the methods with their descriptions, sources and options.

    Example:

      vlm-unlearn methods --json
    """
    with status_console().status("loading torch"):
        from vlm_unlearn.methods import METHODS
        from vlm_unlearn.methods.wrappers import DEFENSES

        registry: Registry[Any] = DEFENSES if defenses else METHODS
        available = dict(registry.working_items(lambda error: typer.echo(f"warning: {error}", err=True)))
    if as_json:
        print_json(
            [
                {"name": name, "about": _about(plugin), "source": plugin.source, "options": _options(plugin)}
                for name, plugin in available.items()
            ]
        )
        return
    for name, plugin in available.items():
        options = ", ".join(f"{key}={value}" for key, value in _options(plugin).items())
        typer.echo(f"{name:<12}{_about(plugin)}\n{'':<12}{plugin.source}\n{'':<12}{options or 'no options'}")


NAME_WORDS = 5  # a first sentence of at most this many words is only the method's name


def _about(method: type[Method] | type[Defense]) -> str:
    """Returns the first sentence of a docstring without its source, or two if the first is only the plug-in's name."""
    import inspect
    import re

    text = re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", " ".join((inspect.getdoc(method) or "").replace("`", "").split()))
    first, *following = re.split(r"(?<=\.)\s+(?=[A-Z])", text)
    return " ".join([first, *following[:1]]) if len(first.split()) <= NAME_WORDS else first


def _options(method: type[Method] | type[Defense]) -> dict[str, object]:
    return {key: field.default for key, field in method.options_type.model_fields.items()}
