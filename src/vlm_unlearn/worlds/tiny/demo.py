"""Both papers in miniature: one world, one base model, one row per method, and the same questions for all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_unlearn.config import MetricConfig, Recipe, Suite, load, shipped_names
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.training_set import write_training_set
from vlm_unlearn.data_tools.diversify import diversify
from vlm_unlearn.data_tools.importers import import_safe_eraser, import_vlguard
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.methods import METHODS
from vlm_unlearn.records import Summary
from vlm_unlearn.store import SUMMARY, RunDirectory, write_json
from vlm_unlearn.training.plan import recipe_name
from vlm_unlearn.training.runner import run_recipe
from vlm_unlearn.worlds.tiny.base_model import BaseConfig, base_model
from vlm_unlearn.worlds.tiny.robustness import attack_row
from vlm_unlearn.worlds.tiny.threads import limit_to_one_thread
from vlm_unlearn.worlds.tiny.world import write_world

Progress = Callable[[str, int, int, str], None]  # called with (stage, done, total, detail)


@dataclass(frozen=True)
class DemoRow:
    """A trained row of the demo."""

    recipe: str
    data: str  # the training set
    utility: str  # the split with the harmless questions that the row's paper retains
    prompt_decouple_weight: float | None = None  # None keeps the value of the recipe
    name: str = ""  # an empty name keeps the name of the recipe
    method: Mapping[str, Any] | None = None  # None keeps the method of the recipe


ROWS = (
    DemoRow("tiny/mixed_sft", "vlguard_refusals", "safe"),
    DemoRow("tiny/npo", "vlguard_harmful", "safe"),
    DemoRow("tiny/rmu", "vlguard_harmful", "safe"),
    DemoRow("tiny/po", "safe_eraser", "harmless"),
    DemoRow("tiny/po_pd", "safe_eraser", "harmless"),
    DemoRow("tiny/npo_refusal_pd", "safe_eraser", "harmless"),
)
WORDS_WITHOUT_TRIGGERS = ("tell", "describe", "give", "please", "can")
SUPERVISED_ROWS = (
    DemoRow("tiny/mixed_sft", "vlguard_refusals", "safe"),
    DemoRow("tiny/posthoc_sft", "vlguard_posthoc", "safe"),
    DemoRow("tiny/mixed_sft", "vlguard_diversified", "safe", name="mixed_sft diversified"),
)


def full_rows() -> list[DemoRow]:
    """Returns the rows of the full demo: supervised fine-tuning, and every other method alone and with decoupling.

    All unlearning rows use one training set, so that rows with and without prompt decoupling differ in nothing else.
    A method without a recipe in ``recipes/tiny`` trains with that of npo.
    """
    recipes = shipped_names()
    rows = list(SUPERVISED_ROWS)
    for name, method in METHODS.built_in_items():
        if not method.unlearns and method.forget_target == "original":
            continue  # supervised fine-tuning
        has_recipe = f"tiny/{name}" in recipes
        options = None if has_recipe else {"name": name, **method.tiny_options}
        for weight in (0.0, 1.0):
            recipe = f"tiny/{name if has_recipe else 'npo'}"
            rows.append(DemoRow(recipe, "safe_eraser_preferred", "harmless", weight, method=options))
    return [*rows, DemoRow("tiny/npo_refusal_pd", "safe_eraser_preferred", "harmless")]


def run_demo(out: Path, seed: int, progress: Progress, full: bool = False) -> Summary:
    """Runs the demo: writes the world, trains, evaluates and attacks the base and all rows, and compares the rows.

    A demo that was killed resumes.

    Args:
        out: The output folder. It gets ``summary.json``, ``world/``, ``data/``, ``runs/<row>/``,
            ``evaluations/<row>/`` and ``robustness/<row>/``.
        seed: The seed of the world, the base model and every run.
        progress: Called with (stage, done, total, detail).
        full: Trains every method with and without prompt decoupling, instead of the rows of the two papers, and tries
            more attacks on each model.

    Raises:
        UserError: `out` contains other files, or a demo with another seed.
    """
    with limit_to_one_thread():
        return _run_demo(out, seed, progress, full)


def _run_demo(out: Path, seed: int, progress: Progress, full: bool) -> Summary:
    RunDirectory(out).open({"kind": "demo", "seed": seed, "full": full} if full else {"kind": "demo", "seed": seed})
    world = out / "world"
    write_world(world, seed)
    write_training_sets(world, out / "data", full)
    base = base_model(
        BaseConfig(seed=seed), lambda step, steps, loss: progress("base", step, steps, f"loss {loss:.3f}")
    )
    runs = {"base": evaluate_row("base", base, out, world, ["safe", "harmless"], progress)}
    for demo_row in full_rows() if full else ROWS:
        recipe = row_recipe(demo_row, base, out, seed)
        name = recipe_name(recipe)

        def on_step(step: int, steps: int, parts: Mapping[str, float], name: str = name) -> None:
            progress(name, step, steps, f"loss {float(parts['loss']):.3f}")

        runs[name] = evaluate_row(name, run_recipe(recipe, on_step), out, world, [demo_row.utility], progress)
        attack_row(out, name, training_folder(out, name), full, progress)
    summary, _ = compare_runs(runs)  # utility: on the splits that both rows count
    write_json(out / SUMMARY, summary.model_dump())
    return summary


def row_recipe(row: DemoRow, base: Path, out: Path, seed: int) -> Recipe:
    """Returns the recipe of a row of a demo in the folder `out`."""
    values: dict[str, object] = {"model": str(base), "data": str(out / "data" / row.data), "output": "."}
    if row.prompt_decouple_weight is not None:
        values["prompt_decouple_weight"] = row.prompt_decouple_weight
    if row.method is not None:
        values["method"] = row.method
    if row.name:
        values["name"] = row.name
    recipe = load(Recipe, Path(row.recipe), [f"training.seed={seed}"], values)
    return recipe.model_copy(update={"output": training_folder(out, recipe_name(recipe))})


def training_folder(out: Path, name: str) -> Path:
    """Returns the folder of a row's training run. It does not exist for the base model."""
    return out / "runs" / name.replace("+", "_").replace(" ", "_")


def write_training_sets(world: Path, data: Path, full: bool) -> None:
    """Writes the training sets of the published pipelines: VLGuard with refusals or harmful answers, and SafeEraser."""
    vlguard, general = world / "vlguard", world / "general" / "general.json"
    train = vlguard / "train.json", vlguard / "train"
    eraser = world / "safe_eraser"
    import_vlguard(*train, data / "vlguard_refusals", include_safe_image_unsafe=True, external=general)
    if not full:
        import_vlguard(*train, data / "vlguard_harmful", vlguard / "harmful_answers.json", external=general)
        import_safe_eraser(eraser / "all_train.json", eraser, data / "safe_eraser", eraser / "prompt.json")
        return
    import_vlguard(*train, data / "vlguard_posthoc", include_safe_image_unsafe=True)
    diversify(data / "vlguard_refusals", data / "vlguard_diversified", words=WORDS_WITHOUT_TRIGGERS)
    with_preferred = data / "safe_eraser_preferred"
    import_safe_eraser(eraser / "all_train.json", eraser, with_preferred, eraser / "prompt.json")
    _prefer_refusals(with_preferred)


def _prefer_refusals(data: Path) -> None:
    """Adds a preferred set with one refusal for each forget example of a SafeEraser set, for dpo."""
    training_set = UnlearningDataset.from_folder(data)
    refusals = training_set.refusals
    preferred = [
        example.model_copy(update={"answer": refusals[number % len(refusals)]})
        for number, example in enumerate(training_set["forget"])
    ]
    examples = {**training_set, "preferred": preferred}
    source = {"format": "safe_eraser", "preferred": "refusals"}
    write_training_set(data, training_set.image_roots, examples, source, refusals)


def evaluate_row(name: str, model: Path, out: Path, world: Path, utility: list[str], progress: Progress) -> Path:
    """Evaluates a model of a demo into ``evaluations/<name>``, and returns that folder. `utility` names the splits."""
    suite = load(Suite, Path("suites/tiny"), values={"model": str(model), "root": str(world)})
    metrics = {**suite.metrics, "utility": MetricConfig(splits=utility, labels=["complied"])}
    suite = suite.model_copy(update={"metrics": metrics})
    folder = out / "evaluations" / name
    evaluate_run(suite, folder, name, lambda stage, done, total: progress(f"{name}: {stage}", done, total, ""))
    return folder
