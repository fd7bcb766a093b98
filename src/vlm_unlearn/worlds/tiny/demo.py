"""Both papers in miniature: one world, one base model, one row per method, and the same questions for all rows."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm_unlearn.config import MetricConfig, Recipe, Suite, load, shipped_names
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.training_set import write_training_set
from vlm_unlearn.data_tools.diversify import diversify
from vlm_unlearn.data_tools.importers import import_safe_eraser, import_vlguard
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.methods import METHODS
from vlm_unlearn.records import Summary
from vlm_unlearn.reporting.charts.curves import write_loss_png
from vlm_unlearn.store import SUMMARY, RunDirectory, peak_memory_mb, write_json
from vlm_unlearn.training.plan import recipe_name
from vlm_unlearn.training.runner import run_recipe
from vlm_unlearn.worker_pool import Progress, Task, TaskResults, run_tasks
from vlm_unlearn.worlds.tiny.base_model import BaseConfig, base_model, base_model_folder, never_knew_model
from vlm_unlearn.worlds.tiny.robustness import attack_row
from vlm_unlearn.worlds.tiny.threads import limit_to_one_thread
from vlm_unlearn.worlds.tiny.world import write_world


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


def run_demo(out: Path, seed: int, progress: Progress, full: bool = False, processes: int = 1) -> Summary:
    """Runs the demo: writes the world, trains, evaluates and attacks the base and all rows, and compares the rows.

    A demo that was killed resumes. The results do not depend on the number of processes.

    Args:
        out: The output folder. It gets ``summary.json``, ``world/``, ``data/``, ``runs/<row>/``,
            ``evaluations/<row>/`` and ``robustness/<row>/``.
        seed: The seed of the world, the base model and every run.
        progress: Called with (stage, done, total, detail).
        full: Trains every method with and without prompt decoupling, instead of the rows of the two papers, and tries
            more attacks on each model.
        processes: The number of models that are trained, evaluated or attacked at the same time, each by a process with
            one thread and up to 0.9 GB of memory. A script that passes more than 1 needs ``if __name__ ==
            "__main__":`` around its code, as with all of Python's processes.

    Raises:
        UserError: `out` contains other files, or a demo with another seed.
        RunError: A process was killed, or a training has failed.
    """
    return run_demo_tasks(out, seed, progress, full, processes)[0]


def run_demo_tasks(
    out: Path, seed: int, progress: Progress, full: bool = False, processes: int = 1
) -> tuple[Summary, TaskResults]:
    """Runs the demo as `run_demo`, and returns the results of its tasks too."""
    RunDirectory(out).open({"kind": "demo", "seed": seed, "full": full} if full else {"kind": "demo", "seed": seed})
    world = out / "world"
    write_world(world, seed)
    write_training_sets(world, out / "data", full)
    base = base_model_folder(BaseConfig(seed=seed))
    rows = {recipe_name(row_recipe(row, base, out, seed)): row for row in (full_rows() if full else ROWS)}
    with limit_to_one_thread():
        results = run_tasks(
            demo_tasks(out, seed, rows, full), processes, progress, prepare_worker, peak_memory_mb=peak_memory_mb
        )
    runs = {name: out / "evaluations" / name for name in ("base", *rows)}
    summary, _ = compare_runs(runs)  # utility: on the splits that both rows count
    write_json(out / SUMMARY, summary.model_dump())
    return summary, results


def demo_tasks(out: Path, seed: int, rows: Mapping[str, DemoRow], full: bool) -> list[Task]:
    """Returns the tasks of a demo, in the order in which a single process runs them.

    The first row that is attacked puts the measurements of the base and of the control into the cache. The attacks on
    the others wait for it.

    Args:
        out: The folder of the demo, with its world and its training sets.
        seed: The seed.
        rows: The rows by name.
        full: Whether the demo is the full one.
    """
    base = base_model_folder(BaseConfig(seed=seed))
    tasks = [
        Task("base", train_base, (seed, True), weight=math.inf),
        Task("evaluate base", evaluate_base, (out, seed), ("base",)),
    ]
    control = Task("never knew", train_base, (seed, False), weight=math.inf)
    attacks: list[Task] = []
    for name, row in rows.items():
        steps = row_recipe(row, base, out, seed).training.max_steps or 0
        tasks.append(Task(name, train_row, (out, seed, row), ("base",), weight=steps))
        after = [name, control.name, *(attack.name for attack in attacks[:1])]
        attacks.append(Task(f"attack {name}", attack_row, (out, name, training_folder(out, name), full), after))
        tasks += [*([control] if len(attacks) == 1 else []), attacks[-1]]
    return tasks


def prepare_worker() -> None:
    """Prepares a process for the tasks of a demo: one thread, and no messages of libraries."""
    from transformers.utils import logging

    gc.freeze()  # the libraries stay, so that garbage collection need not look at their objects
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def train_base(seed: int, harmful: bool, progress: Progress) -> Path:
    """Returns the base model or the control of a demo, which it trains if the cache does not contain it."""
    name = "base" if harmful else "never knew"
    train = base_model if harmful else never_knew_model
    return train(BaseConfig(seed=seed), lambda step, steps, loss: progress(name, step, steps, f"loss {loss:.3f}"))


def evaluate_base(out: Path, seed: int, progress: Progress) -> Path:
    """Evaluates the base model of a demo and returns the folder of its evaluation."""
    base = base_model_folder(BaseConfig(seed=seed))
    return evaluate_row("base", base, out, out / "world", ["safe", "harmless"], progress)


def train_row(out: Path, seed: int, row: DemoRow, progress: Progress) -> Path:
    """Trains and evaluates a row of a demo and returns the folder of its evaluation."""
    recipe = row_recipe(row, base_model_folder(BaseConfig(seed=seed)), out, seed)
    name = recipe_name(recipe)

    def on_step(step: int, steps: int, parts: Mapping[str, float]) -> None:
        progress(name, step, steps, f"loss {float(parts['loss']):.3f}")

    model = run_recipe(recipe, on_step)
    write_loss_png(training_folder(out, name))
    return evaluate_row(name, model, out, out / "world", [row.utility], progress)


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
