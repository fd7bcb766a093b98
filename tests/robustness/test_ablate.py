"""Directional ablation removes one direction, and measures questions that did not choose it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attack_targets import tiny_target
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.hf import weights_digest
from vlm_unlearn.robustness.ablate import Ablate, AblateOptions, ablated
from vlm_unlearn.robustness.base import AttackTarget

OPTIONS = AblateOptions(positions=2, num_questions=6, batch_size=4)


@pytest.fixture
def target(tiny_model: Path, training_sets: dict[str, Path], world: Path) -> AttackTarget:
    return tiny_target(tiny_model, training_sets["safe_eraser"], world)


def batch_of(target: AttackTarget, count: int = 3) -> dict[str, Tensor]:
    turns = [Turn.of_prompt(request.prompt, request.image) for request in target.questions[:count]]
    return encode(target.vlm.processor, turns, "right")


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_no_layer_reads_or_writes_the_direction(target: AttackTarget) -> None:
    direction = torch.randn(target.vlm.hidden_size, generator=torch.Generator().manual_seed(0))
    unit = direction / direction.norm()
    read: list[Tensor] = []
    with ablated(target.vlm, direction):
        for layer in target.vlm.decoder_layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
        with torch.no_grad():
            hidden = target.vlm.run(batch_of(target), torch.tensor([0]), range(2))[1]
    assert len(read) == 4
    for states in [*read, *hidden.values()]:
        assert (states @ unit).abs().max() < 1e-5
        assert states.norm() > 0.1


def test_ablation_equals_orthogonal_weights(target: AttackTarget) -> None:
    """Arditi et al., section 4.1: every matrix that writes to the residual stream is orthogonal to the direction."""
    vlm, batch = target.vlm, batch_of(target)
    positions = torch.arange(batch["input_ids"].numel())
    direction = torch.randn(vlm.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ablated(vlm, direction):
        logits = vlm.run(batch, positions)[0]
    unit = direction / direction.norm()
    with torch.no_grad():
        embeddings = vlm.model.get_input_embeddings().weight
        embeddings -= (embeddings @ unit)[:, None] * unit
        for layer in vlm.decoder_layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight -= torch.outer(unit, unit @ writer.weight)
        last = vlm.projectors[0].linear_2
        last.weight -= torch.outer(unit, unit @ last.weight)
        last.bias -= (unit @ last.bias) * unit
        torch.testing.assert_close(vlm.run(batch, positions)[0], logits, rtol=1e-4, atol=1e-5)


def test_the_measured_half_is_not_the_half_that_chose(target: AttackTarget) -> None:
    states = list(Ablate(OPTIONS).run(target))
    assert [state.name for state in states] == ["ablate/direction", "ablate/random"]
    assert {state.group_ids for state in states} == {target.halves.second_groups(target.prompts)}
    facts = states[0].facts
    assert facts["layer"] in (0, 1)
    assert facts["position"] in (-1, -2)
    assert facts["kl"] >= 0
    references = {prompt.reference for prompt in target.prompts}
    measured = {prompt.reference for prompt in target.prompts if prompt.group_id in (states[0].group_ids or ())}
    assert 0 < len(measured) < len(references)
    # Other answers in the measured half change nothing.
    questions = [
        request
        if request.prompt.reference not in measured
        else type(request)(request.prompt.model_copy(update={"question": "describe this ."}), 0, request.image)
        for request in target.questions
    ]
    again = next(Ablate(OPTIONS).run(AttackTarget(**{**vars(target), "questions": questions})))
    assert again.facts == facts


def test_the_model_is_as_it_was_when_the_attack_ends_or_is_closed(target: AttackTarget) -> None:
    target.vlm.run(batch_of(target), torch.tensor([0]))  # transformers adds hooks at the first call
    digest, count = weights_digest(target.vlm.model, target.vlm.processor), hooks(target.vlm.model)
    states = Ablate(OPTIONS).run(target)
    next(states)
    assert hooks(target.vlm.model) > count
    states.close()  # type: ignore[attr-defined]
    assert hooks(target.vlm.model) == count
    list(Ablate(OPTIONS).run(target))
    assert hooks(target.vlm.model) == count
    assert weights_digest(target.vlm.model, target.vlm.processor) == digest


@pytest.mark.parametrize(("field", "code"), [("harmless", "missing-setting"), ("reference", "missing-field")])
def test_harmless_questions_and_references_are_required(target: AttackTarget, field: str, code: str) -> None:
    if field == "harmless":
        changed = {"harmless": []}
    else:
        changed = {
            "questions": [
                type(request)(request.prompt.model_copy(update={"reference": None}), 0, request.image)
                for request in target.questions
            ]
        }
    with pytest.raises(UserError) as error:
        next(Ablate(OPTIONS).run(AttackTarget(**{**vars(target), **changed, "halves": _AllFirst()})))
    assert (error.value.code, error.value.field) == (code, field)


class _AllFirst:
    """Halves of which the first contains all questions."""

    def first_groups(self, prompts: list[object]) -> frozenset[str]:
        return frozenset(prompt.group_id for prompt in prompts)  # type: ignore[attr-defined]
