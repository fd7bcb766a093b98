"""Probes equal values computed by hand, and by generating."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from guarded_models import attack_target
from helpers import raises_code
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.generation.hf import weights_digest
from vlm_unlearn.robustness.base import AttackTarget
from vlm_unlearn.robustness.probe import (
    Probe,
    ProbeOptions,
    distinguishing_index,
    extraction_strength,
    geometric_mean,
    min_k_probability,
    ridge_predictions,
)


@pytest.fixture(scope="module")
def target(tiny_model: Path, world: Path, training_sets: dict[str, Path]) -> AttackTarget:
    return attack_target(tiny_model, world, training_sets["safe_eraser"])


def scores_of(target: AttackTarget, **options: Any) -> dict[str, dict[str, float]]:
    attack = Probe(ProbeOptions.model_validate(options))
    return {state.name: dict(state.scores or {}) for state in attack.run(target)}


def test_values_by_hand() -> None:
    logs = torch.tensor([0.5, 0.125, 0.25, 1.0, 0.5]).log()
    assert geometric_mean(logs) == pytest.approx((0.5 * 0.125 * 0.25 * 1 * 0.5) ** 0.2)
    assert min_k_probability(logs, 0.4) == pytest.approx(math.sqrt(0.125 * 0.25))
    assert min_k_probability(logs, 0.1) == pytest.approx(0.125)  # at least one token
    assert extraction_strength([True] * 4) == 1
    assert extraction_strength([True, False, True, True]) == 0.5
    assert extraction_strength([False] * 4) == 0


def test_distinguishing_token_is_the_first_that_fewer_than_half_share() -> None:
    others = [[7, 1, 4], [7, 2, 4], [7, 1, 5], [8, 1, 4]]
    assert distinguishing_index([7, 1, 6], others) == 2  # half of them begin with 7, 1
    assert distinguishing_index([7, 2, 4], others) == 1
    assert distinguishing_index([9, 2, 4], others) == 0
    assert distinguishing_index([7, 2, 4], []) == 0
    assert distinguishing_index([7], [[7, 1], [7, 2]]) == 0


def test_ridge_regression_by_hand() -> None:
    """With one feature at -1 and 1, the class of a point is that of the nearer example. The bias is half of each."""
    inputs, targets = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    predictions = ridge_predictions(inputs, targets, torch.tensor([[-0.1], [0.2], [5.0]]), 0.5)
    assert predictions.tolist() == [0, 1, 1]
    # The dual form equals the primal one, (X'X + penalty I)^-1 X'Y.
    torch.manual_seed(0)
    inputs, states = torch.randn(12, 5), torch.randn(40, 5)
    targets = torch.randint(3, (12,))
    centered = (inputs - inputs.mean(0)).double()
    one_hot = torch.nn.functional.one_hot(targets, 3).double()
    penalty = 0.1 * centered.square().sum(1).mean() * torch.eye(5)
    weights = torch.linalg.solve(centered.T @ centered + penalty, centered.T @ (one_hot - one_hot.mean(0)))
    expected = ((states - inputs.mean(0)).double() @ weights + one_hot.mean(0)).argmax(1)
    assert ridge_predictions(inputs, targets, states, 0.1).tolist() == expected.tolist()


def test_scores_equal_those_of_one_question_at_a_time(target: AttackTarget) -> None:
    digest = weights_digest(target.vlm.model, target.vlm.processor)
    scores = scores_of(target, batch_size=5)
    assert list(scores) == [
        *("probe/likelihood", "probe/extraction_strength", "probe/min_k"),
        *("probe/linear/0", "probe/linear/1", "probe/logit_lens/0", "probe/logit_lens/1"),
    ]
    assert all(len(values) == len(target.prompts) for values in scores.values())
    assert all(0 <= value <= 1 for values in scores.values() for value in values.values())
    assert scores == scores_of(target, batch_size=5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in target.vlm.model.modules())
    tokenizer, model = target.vlm.processor.tokenizer, target.vlm.model
    for request in target.questions[::5]:
        prompt = request.prompt
        question = encode(target.vlm.processor, [Turn.of_prompt(prompt, request.image)], "right")
        answer = tokenizer(f"{prompt.reference} </s>", return_tensors="pt")["input_ids"][0]
        width = question["input_ids"].shape[1]
        ids = torch.cat([question["input_ids"], answer[None]], dim=1)
        pixels = question["pixel_values"]
        with torch.no_grad():
            outputs = model(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
        logs = outputs.logits[0, width - 1 : -1].log_softmax(-1)
        of_tokens = logs[torch.arange(len(answer)), answer]
        assert scores["probe/likelihood"][prompt.id] == pytest.approx(of_tokens.mean().exp().item(), abs=1e-5)
        assert scores["probe/min_k"][prompt.id] == pytest.approx(of_tokens.min().exp().item(), abs=1e-5)
        # The ingredient after "mix". The lens of the last layer is the model's output.
        rank = 1 + (logs[1] > logs[1, answer[1]]).sum().item()
        assert scores["probe/logit_lens/1"][prompt.id] == pytest.approx(1 / rank)
        head = model.get_output_embeddings()
        early = head(target.vlm.final_norm(outputs.hidden_states[1][0, width]))
        rank = 1 + (early > early[answer[1]]).sum().item()
        assert scores["probe/logit_lens/0"][prompt.id] == pytest.approx(1 / rank)
    assert weights_digest(target.vlm.model, target.vlm.processor) == digest


def test_extraction_strength_is_that_of_generated_continuations(target: AttackTarget) -> None:
    """The smallest prefix is searched by generating after each."""
    scores = scores_of(target)
    tokenizer, model = target.vlm.processor.tokenizer, target.vlm.model
    for request in target.questions[::7]:
        question = encode(target.vlm.processor, [Turn.of_prompt(request.prompt, request.image)], "right")
        answer = tokenizer(f"{request.prompt.reference} </s>", return_tensors="pt")["input_ids"]
        for prefix in range(answer.shape[1] + 1):
            ids = torch.cat([question["input_ids"], answer[:, :prefix]], dim=1)
            rest = answer.shape[1] - prefix
            continuation = ids[:, :0]
            if rest:
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=question["pixel_values"],
                    do_sample=False,
                    max_new_tokens=rest,
                )
                continuation = output[:, ids.shape[1] :]
            if torch.equal(continuation, answer[:, prefix:]):
                break
        assert scores["probe/extraction_strength"][request.prompt.id] == pytest.approx(1 - prefix / answer.shape[1])


def test_options_select_layers_concept_and_score(target: AttackTarget) -> None:
    scores = scores_of(target, layers=[1], concept="category", lens="probability")
    assert [name for name in scores if name.count("/") == 2] == ["probe/linear/1", "probe/logit_lens/1"]
    assert scores["probe/logit_lens/1"] != scores_of(target, layers=[1])["probe/logit_lens/1"]
    with raises_code("invalid-field", field="layers"):
        scores_of(target, layers=[2])


def test_questions_without_a_reference_have_no_score(target: AttackTarget) -> None:
    bare = [replace(item, prompt=item.prompt.model_copy(update={"reference": None})) for item in target.questions]
    mixed = replace(target, questions=[*bare[:3], *target.questions[3:]])
    for values in scores_of(mixed).values():
        assert list(values) == [prompt.id for prompt in target.prompts[3:]]
    with raises_code("missing-reference", field="questions"):
        scores_of(replace(target, questions=bare))
