"""Both papers in miniature: one world, one base model, a row for each method, the same questions for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_unlearn.config import MetricConfig, Recipe, Suite, load
from vlm_unlearn.data.diversify import diversify
from vlm_unlearn.data.importers import import_safe_eraser, import_vlguard
from vlm_unlearn.data.training_set import read_training_set, write_training_set
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.records import Summary
from vlm_unlearn.store import open_run, write_json
from vlm_unlearn.tiny_world.base_model import BaseConfig, base_model
from vlm_unlearn.tiny_world.threads import limit_to_one_thread
from vlm_unlearn.tiny_world.world import write_world
from vlm_unlearn.training.plan import recipe_name
from vlm_unlearn.training.runner import run_recipe

Progress = Callable[[str, int, int, str], None]  # stage, done, all, detail


@dataclass(frozen=True)
class DemoRow:
    """A trained row: its recipe, its training set, and the harmless questions that its paper retains."""

    recipe: str
    data: str
    utility: str
    prompt_decouple_weight: float | None = None  # None: the recipe's
    name: str = ""  # "": the recipe's


ROWS = (
    DemoRow("tiny/mixed_sft", "vlguard_refusals", "safe"),
    DemoRow("tiny/npo", "vlguard_harmful", "safe"),
    DemoRow("tiny/rmu", "vlguard_harmful", "safe"),
    DemoRow("tiny/po", "safe_eraser", "harmless"),
    DemoRow("tiny/po_pd", "safe_eraser", "harmless"),
)
WORDS_OF_NO_ATTACK = ("tell", "describe", "give", "please", "can")
UNLEARNING = ("ga", "gd", "kl", "npo", "simnpo", "rmu", "rr", "undial", "po", "idk_dpo", "dpo")
# All unlearning rows on one set, so that with and without prompt decoupling differ in nothing else.
FULL_ROWS = (
    DemoRow("tiny/mixed_sft", "vlguard_refusals", "safe"),
    DemoRow("tiny/posthoc_sft", "vlguard_posthoc", "safe"),
    DemoRow("tiny/mixed_sft", "vlguard_diversified", "safe", name="mixed_sft diversified"),
    *(
        DemoRow(f"tiny/{method}", "safe_eraser_preferred", "harmless", weight)
        for method in UNLEARNING
        for weight in (0.0, 1.0)
    ),
)


def run_demo(out: Path, seed: int, progress: Progress, full: bool = False) -> Summary:
    """Makes the world, trains the base and every row, asks all of them the same questions; writes ``summary.json``,
    with every row compared to the base.

    `out` gets ``world/``, ``data/``, ``runs/<row>/`` and ``evaluations/<row>/``. Called again after a kill it goes on.

    Args:
        full: every method with and without prompt decoupling, instead of the two papers' rows.

    Raises:
        UserError: `out` holds something else, or a demo of another seed.
    """
    with limit_to_one_thread():
        return _run_demo(out, seed, progress, full)


def _run_demo(out: Path, seed: int, progress: Progress, full: bool) -> Summary:
    open_run(out, {"kind": "demo", "seed": seed, "full": full} if full else {"kind": "demo", "seed": seed})
    world = out / "world"
    write_world(world, seed)
    _training_sets(world, out / "data", full)
    base = base_model(
        BaseConfig(seed=seed), lambda step, steps, loss: progress("base", step, steps, f"loss {loss:.3f}")
    )
    runs = {"base": _evaluate("base", base, out, world, ["safe", "harmless"], progress)}
    for demo_row in FULL_ROWS if full else ROWS:
        recipe = _recipe(demo_row, base, out, seed)
        name = recipe_name(recipe)

        def on_step(step: int, steps: int, parts: Mapping[str, float], name: str = name) -> None:
            progress(name, step, steps, f"loss {float(parts['loss']):.3f}")

        runs[name] = _evaluate(name, run_recipe(recipe, on_step), out, world, [demo_row.utility], progress)
    summary, _ = compare_runs(runs)  # of the kinds of question whose utility both count
    write_json(out / "summary.json", summary.model_dump())
    return summary


def _recipe(row: DemoRow, base: Path, out: Path, seed: int) -> Recipe:
    values: dict[str, object] = {"model": str(base), "data": str(out / "data" / row.data), "output": "."}
    if row.prompt_decouple_weight is not None:
        values["prompt_decouple_weight"] = row.prompt_decouple_weight
    if row.name:
        values["name"] = row.name
    recipe = load(Recipe, Path(row.recipe), [f"training.seed={seed}"], values)
    return recipe.model_copy(update={"output": training_folder(out, recipe_name(recipe))})


def training_folder(out: Path, name: str) -> Path:
    """The training run of a demo's row; the base has none."""
    return out / "runs" / name.replace("+", "_").replace(" ", "_")


def _training_sets(world: Path, data: Path, full: bool) -> None:
    """The published pipelines' results on the world's files: refusals as given, harmful answers injected, and SafeEraser's."""
    vlguard, general = world / "vlguard", world / "general" / "general.json"
    train = vlguard / "train.json", vlguard / "train"
    eraser = world / "safe_eraser"
    import_vlguard(*train, data / "vlguard_refusals", include_safe_image_unsafe=True, external=general)
    if not full:
        import_vlguard(*train, data / "vlguard_harmful", vlguard / "harmful_answers.json", external=general)
        import_safe_eraser(eraser / "all_train.json", eraser, data / "safe_eraser", eraser / "prompt.json")
        return
    import_vlguard(*train, data / "vlguard_posthoc", include_safe_image_unsafe=True)
    diversify(data / "vlguard_refusals", data / "vlguard_diversified", words=WORDS_OF_NO_ATTACK)
    with_preferred = data / "safe_eraser_preferred"
    import_safe_eraser(eraser / "all_train.json", eraser, with_preferred, eraser / "prompt.json")
    _prefer_refusals(with_preferred)


def _prefer_refusals(folder: Path) -> None:
    """Gives each forget example of a SafeEraser set a refusal of its own, which dpo is to prefer."""
    whole = read_training_set(folder)
    preferred = [
        example.model_copy(update={"answer": whole.refusals[number % len(whole.refusals)]})
        for number, example in enumerate(whole.examples["forget"])
    ]
    examples = {**whole.examples, "preferred": preferred}
    write_training_set(
        folder, whole.images, examples, {"format": "safe_eraser", "preferred": "refusals"}, whole.refusals
    )


def _evaluate(name: str, model: Path, out: Path, world: Path, utility: list[str], progress: Progress) -> Path:
    suite = load(Suite, Path("suites/tiny"), values={"model": str(model), "root": str(world)})
    metrics = {**suite.metrics, "utility": MetricConfig(splits=utility, labels=["complied"])}
    suite = suite.model_copy(update={"metrics": metrics})
    folder = out / "evaluations" / name
    evaluate_run(suite, folder, name, lambda stage, done, total: progress(f"{name}: {stage}", done, total, ""))
    return folder
