"""Attacks on the models of the demo: their suite, their base and their control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_unlearn.config import ModelAttackConfig, RobustnessSuite, load
from vlm_unlearn.robustness.runner import run_robustness
from vlm_unlearn.store import RunDirectory, user_path
from vlm_unlearn.worlds.tiny.base_model import BaseConfig, base_model, never_knew_model

# Of the default demo: what a few examples of one half bring back in the other.
RELEARNING = ModelAttackConfig.model_validate({"name": "relearn", "examples": 10, "steps": [5, 20]})
FULL_DEMO_ATTACKS = ("prefill", "relearn", "quantize")  # of the suite, for every row of the full demo


@dataclass(frozen=True)
class DemoModels:
    """The suite, the base and the control of the models of a demo.

    Attributes:
        suite: The suite of the tiny world, for the world of the demo.
        base: The folder of the base model.
        never_knew: The folder of the model that never knew.
    """

    suite: RobustnessSuite
    base: Path
    never_knew: Path


def find_demo(run: str) -> Path | None:
    """Returns the folder of the demo that a training run belongs to, or None if it belongs to none."""
    demo = RunDirectory(user_path(run).absolute().parent.parent)  # of demo/runs/ROW
    is_demo = demo.exists() and demo.read_manifest()["identity"].get("kind") == "demo"
    return demo.path if is_demo else None


def demo_models(demo: Path, overrides: list[str], on_step: Callable[[str, int, int], None] | None = None) -> DemoModels:
    """Returns suite, base and control of a demo. A model that is not in the cache is trained, in half a minute.

    Args:
        demo: The folder of the demo.
        overrides: Overrides of the suite.
        on_step: Called with the model, the step and the number of steps while a model is trained.
    """
    config = BaseConfig(seed=int(RunDirectory(demo).read_manifest()["identity"].get("seed", 0)))
    # Every row is attacked with SafeEraser's set, whose questions the suite asks, whatever the row was trained on.
    training_sets = (demo / "data" / name for name in ("safe_eraser", "safe_eraser_preferred"))
    data = next(folder for folder in training_sets if folder.is_dir())
    values = {"root": str(demo / "world"), "data": str(data.absolute())}
    suite = load(RobustnessSuite, Path("suites/tiny_robustness"), overrides, values)

    def report(name: str) -> Callable[[int, int, float], None]:
        return lambda step, steps, _: on_step(name, step, steps) if on_step else None

    return DemoModels(suite, base_model(config, report("base")), never_knew_model(config, report("never knew")))


def attack_row(demo: Path, name: str, run: Path, full: bool, progress: Callable[[str, int, int, str], None]) -> None:
    """Attacks the model of one row with the attacks that tell methods apart, into ``robustness/<row>``.

    Args:
        demo: The folder of the demo.
        name: The name of the row.
        run: The training run of the row.
        full: Whether to try all of `FULL_DEMO_ATTACKS`, instead of one.
        progress: Called with (stage, done, total, detail).
    """
    models = demo_models(demo, [], lambda model, step, steps: progress(model, step, steps, ""))
    attacks = [attack for attack in models.suite.small if attack.name in FULL_DEMO_ATTACKS] if full else [RELEARNING]
    suite = models.suite.model_copy(update={"small": attacks})

    def on_done(activity: str, done: int, total: int) -> None:
        progress(f"{name}: attacks", done, total, activity)

    run_robustness(
        suite,
        str(run),
        str(models.base),
        demo / "robustness" / name,
        str(models.never_knew),
        name=name,
        on_done=on_done,
    )
