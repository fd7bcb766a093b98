"""Perturbations of images on a tiny model with random weights: bounds, exactness, effect and repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guarded_models import attack_target
from helpers import raises_code
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.generation.hf import weights_digest
from vlm_unlearn.robustness.base import AttackedState, AttackTarget
from vlm_unlearn.robustness.pgd import PGD, ImageLevels, PGDOptions, _num_closing_tokens

QUICK = {"epsilons": [8], "steps": 6, "universal_steps": 4, "batch_size": 5}


@pytest.fixture(scope="module")
def target(tiny_model: Path, world: Path, training_sets: dict[str, Path]) -> AttackTarget:
    return attack_target(tiny_model, world, training_sets["safe_eraser"])


def states_of(target: AttackTarget, **options: Any) -> dict[str, AttackedState]:
    attack = PGD(PGDOptions.model_validate({**QUICK, **options}))
    return {state.name: state for state in attack.run(target)}


def levels_of(target: AttackTarget, state: AttackedState | None = None) -> Tensor:
    """Returns the levels [N, 3, H, W] of the images of all questions."""
    pixels = ImageLevels(target.vlm.processor)
    requests = target.questions if state is None else state.requests
    assert requests is not None
    return torch.stack([pixels.read(request.image) for request in requests]).float()


def test_states_stay_within_epsilon_and_leave_the_model_alone(target: AttackTarget) -> None:
    digest = weights_digest(target.vlm.model, target.vlm.processor)
    states = states_of(target)
    assert list(states) == ["pgd/8", "pgd/universal/16", "pgd/random/16"]
    original = levels_of(target)
    for state, epsilon in zip(states.values(), (8, 16, 16), strict=True):
        change = levels_of(target, state) - original
        assert change.abs().max() == epsilon
        assert [request.prompt for request in state.requests or ()] == target.prompts
    assert states["pgd/8"].group_ids is None
    assert states["pgd/universal/16"].group_ids == target.halves.second_groups(target.prompts)
    assert weights_digest(target.vlm.model, target.vlm.processor) == digest
    assert all(parameter.requires_grad and parameter.grad is None for parameter in target.vlm.model.parameters())


def test_the_processor_leaves_perturbed_images_unchanged(target: AttackTarget) -> None:
    state = states_of(target)["pgd/8"]
    request = (state.requests or ())[0]
    turn = Turn.of_prompt(request.prompt, request.image)
    pixels = encode(target.vlm.processor, [turn], "left")["pixel_values"]
    levels = ImageLevels(target.vlm.processor)
    assert torch.allclose(pixels[0], levels.values(levels.read(request.image)), atol=1e-5)


def test_universal_perturbation_is_the_same_for_all_images(target: AttackTarget) -> None:
    original, attacked = levels_of(target), levels_of(target, states_of(target)["pgd/universal/16"])
    free = ((original > 16) & (original < 239)).all(dim=0)
    change = (attacked - original)[:, free]
    assert free.any()
    assert torch.equal(change, change[:1].expand_as(change))


def test_more_steps_make_the_answer_more_likely(target: AttackTarget) -> None:
    nll = [states_of(target, steps=steps, universal=[], random=[])["pgd/8"].facts["nll"] for steps in (1, 12)]
    assert nll[1] < nll[0]


def test_nll_is_that_of_the_reference_answers(target: AttackTarget) -> None:
    """The reported NLL equals that of the transformers model on the perturbed images, question by question."""
    state = states_of(target, universal=[], random=[])["pgd/8"]
    losses = []
    for request in state.requests or ():
        processor, prompt = target.vlm.processor, request.prompt
        question = encode(processor, [Turn.of_prompt(prompt, request.image)], "right")
        answer = processor.tokenizer(f"{prompt.reference} </s>", return_tensors="pt")["input_ids"]
        ids = torch.cat([question["input_ids"], answer], dim=1)
        labels = ids.clone()
        labels[:, : question["input_ids"].shape[1]] = -100
        with torch.no_grad():
            losses.append(
                target.vlm.model(input_ids=ids, pixel_values=question["pixel_values"], labels=labels).loss.item()
            )
    assert state.facts["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_attack_is_repeatable(target: AttackTarget) -> None:
    runs: list[list[Sequence[Any]]] = [
        [[request.image for request in state.requests or ()] for state in states_of(target).values()] for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_affirmative_beginning_needs_no_reference_and_has_no_closing_token(target: AttackTarget) -> None:
    turn = replace(Turn.of_prompt(target.prompts[0], target.questions[0].image), answer="mix this with")
    assert _num_closing_tokens(target.vlm.processor, turn) == 1
    questions = [replace(item, prompt=item.prompt.model_copy(update={"reference": None})) for item in target.questions]
    without = replace(target, questions=questions)
    names = list(states_of(without, target="affirmative", affirmative="mix", universal=[]))
    assert names == ["pgd/affirmative/8", "pgd/affirmative/random/16"]
    with raises_code("missing-reference", field="target"):
        states_of(without)


def test_questions_without_images_are_left_as_they_are(target: AttackTarget) -> None:
    texts = [
        replace(item, image=None, prompt=item.prompt.model_copy(update={"image": None})) for item in target.questions
    ]
    mixed = replace(target, questions=[*texts[:2], *target.questions[2:]])
    state = states_of(mixed, universal=[], random=[])["pgd/8"]
    assert [request.image is None for request in state.requests or ()] == [
        request.image is None for request in mixed.questions
    ]
    with raises_code("no-records", field="questions"):
        states_of(replace(target, questions=texts))


def test_processors_that_change_images_of_the_final_size_are_rejected(
    tiny_model: Path, world: Path, training_sets: dict[str, Path]
) -> None:
    """A processor that enlarges every image and then crops it cannot give the model an exact image."""
    target = attack_target(tiny_model, world, training_sets["safe_eraser"])
    target.vlm.processor.image_processor.size = {"shortest_edge": 40}
    with raises_code("unsupported-family"):
        states_of(target)


@pytest.mark.parametrize("options", [{"epsilons": [0]}, {"epsilons": [256]}, {"steps": 0}, {"step_size": 0.5}])
def test_options_are_bounded(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        PGDOptions.model_validate(options)
