"""A refusal term: the loss is that of the method plus PO's refusal term, in separate and in shared forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from trained import StepResult, StepScene, max_difference
from vlm_unlearn.config import MethodConfig, Recipe, load
from vlm_unlearn.methods import build_method
from vlm_unlearn.methods.base import LossOutput, Step
from vlm_unlearn.modeling.batch_merge import merge_batches
from vlm_unlearn.modeling.packing import packing_of
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.references import FrozenCopyReference
from vlm_unlearn.training.runner import run_recipe

NPO = {"name": "npo", "beta": 0.5}
SIMNPO = {"name": "simnpo", "beta": 1.0}
GD = {"name": "gd", "max_nll": 4.0}
METHODS = pytest.mark.parametrize("method", [NPO, SIMNPO, GD], ids=lambda method: method["name"])


def with_refusals(method: dict[str, object], weight: float = 1.0) -> dict[str, object]:
    return {**method, "refusal_weight": weight}


def refusal_term(step: Step) -> LossOutput:
    """PO's term on the forget questions, whose answers are refusals."""
    refusal = step.cross_entropy("forget")
    return LossOutput(refusal, {"refusal": refusal})


def run_step(scene: StepScene, share_images: bool) -> StepResult:
    """Returns one step of two micro-batches. Without image keys, no question shares its image."""
    reference = FrozenCopyReference(scene.model)
    scene.perturb()
    batches = scene.micro_batches(rows=4, count=2)
    if not share_images:
        for role_batches in batches:
            for batch in role_batches.values():
                del batch["images"]
    return scene.step(batches, reference)


@METHODS
@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["alone", "decoupled"])
@pytest.mark.parametrize("share_images", [True, False], ids=["shared", "separate"])
def test_loss_and_gradients_are_those_of_the_method_plus_the_refusal_term_of_po(
    tiny_model: Path, training_sets: dict[str, Path], share_images: bool, weight: float, method: dict[str, object]
) -> None:
    """The refusals are those of PO at the same positions of the stream. PO's retain term is there already."""
    data = training_sets["safe_eraser"]
    po_scene = StepScene(tiny_model, data, "po")
    po_scene.method.loss = refusal_term  # type: ignore[method-assign]
    both = run_step(StepScene(tiny_model, data, with_refusals(method), weight), share_images)
    alone = run_step(StepScene(tiny_model, data, method, weight), share_images)
    refusal = run_step(po_scene, share_images)
    assert both.terms == pytest.approx({**alone.terms, **refusal.terms}, rel=1e-4)
    total = {name: gradient + refusal.gradients[name] for name, gradient in alone.gradients.items()}
    assert max_difference(both.gradients, total) < 1e-5
    assert max_difference(both.gradients, alone.gradients) > 1e-3


def test_a_question_shares_its_image_with_its_refusal(tiny_model: Path, training_sets: dict[str, Path]) -> None:
    scene = StepScene(tiny_model, training_sets["safe_eraser"], with_refusals(NPO))
    batches = scene.micro_batches(rows=4)[0]
    merged = merge_batches([batches["forget"], batches["preferred"]])
    assert batches["forget"]["images"].equal(batches["preferred"]["images"])
    assert packing_of(VisionLanguageModel(scene.model), merged) is not None


@METHODS
def test_weight_zero_adds_no_role(tiny_model: Path, training_sets: dict[str, Path], method: dict[str, object]) -> None:
    plain = StepScene(tiny_model, training_sets["safe_eraser"], with_refusals(method, 0.0))
    assert plain.method.requirements.roles == ("forget", "retain")
    assert plain.method.preferred_answers is None


@METHODS
def test_refusals_begin_after_their_start(
    tiny_model: Path, training_sets: dict[str, Path], method: dict[str, object]
) -> None:
    """Until then, the step is that of the method alone, and the model does not run the refusals."""
    late = {**with_refusals(method), "refusal_start": 0.5}
    results = {}
    for name, config, progress in (
        ("alone", method, 0.49),
        ("too early", late, 0.49),
        ("late", late, 0.5),
        ("always", with_refusals(method), 0.5),
    ):
        scene = StepScene(tiny_model, training_sets["safe_eraser"], config, weight=1.0)
        reference = FrozenCopyReference(scene.model)
        scene.perturb()
        results[name] = scene.step(scene.micro_batches(rows=4), reference, progress)
    assert results["too early"].terms == pytest.approx(results["alone"].terms, rel=1e-5)
    assert max_difference(results["too early"].gradients, results["alone"].gradients) < 1e-6
    assert results["late"].terms == results["always"].terms
    assert max_difference(results["late"].gradients, results["always"].gradients) == 0
    assert "preferred" not in build_method(MethodConfig.model_validate(late), 1.0).active_roles(0.49)


def test_a_run_logs_the_refusal_term_from_its_start_on(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    terms: list[set[str]] = []
    values = {"model": str(tiny_model), "data": str(training_sets["safe_eraser"]), "output": str(tmp_path / "run")}
    steps = ["training.max_steps=4", "training.per_device_train_batch_size=2", "method.refusal_start=0.5"]
    run_recipe(
        load(Recipe, Path("tiny/npo_refusal_pd"), steps, values), lambda _, __, logged: terms.append(set(logged))
    )
    assert ["refusal" in logged for logged in terms] == [False, False, True, True]
