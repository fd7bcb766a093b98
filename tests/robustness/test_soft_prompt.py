"""The soft prompt on a tiny model with random weights: it equals words of the same embeddings, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guarded_models import attack_target
from helpers import raises_code
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.generation.base import GenerationRequest
from vlm_unlearn.generation.hf import generate_batch, weights_digest
from vlm_unlearn.records import Round
from vlm_unlearn.robustness.base import AttackTarget
from vlm_unlearn.robustness.soft_prompt import SoftPrompt, SoftPromptOptions, soft_prompt

WORDS = ("poison", "recipe", "blue")


@pytest.fixture
def target(tiny_model: Path, world: Path, training_sets: dict[str, Path]) -> AttackTarget:
    return attack_target(tiny_model, world, training_sets["safe_eraser"])


def embeddings_of(target: AttackTarget, words: tuple[str, ...]) -> torch.Tensor:
    ids = target.vlm.processor.tokenizer.convert_tokens_to_ids(list(words))
    return target.vlm.base_model.get_input_embeddings().weight.detach()[ids].clone()


def with_words(request: GenerationRequest, position: str) -> GenerationRequest:
    texts = [" ".join(WORDS), request.prompt.question]
    question = " ".join(texts if position == "before_question" else reversed(texts))
    return replace(request, prompt=request.prompt.model_copy(update={"question": question}))


@pytest.mark.parametrize("position", ["before_question", "after_question"])
def test_vectors_of_words_act_as_the_words(target: AttackTarget, position: str) -> None:
    """Also with prefix sharing in generation: the questions about one image are in one batch."""
    requests = list(target.questions[:6])
    spelled = [with_words(request, position) for request in requests]
    model = target.vlm.model
    config = target.generation.model_copy(update={"max_new_tokens": 8})
    expected = generate_batch(model, target.vlm.processor, spelled, config)
    batch = encode(target.vlm.processor, [Turn.of_prompt(item.prompt, item.image) for item in spelled], "left")
    with torch.no_grad():
        expected_logits = model(**batch).logits
    with soft_prompt(target.vlm, embeddings_of(target, WORDS), position), torch.no_grad():
        texts = generate_batch(model, target.vlm.processor, requests, config)
        batch = encode(target.vlm.processor, [Turn.of_prompt(item.prompt, item.image) for item in requests], "left")
        logits = model(**batch).logits
    assert torch.allclose(logits, expected_logits, atol=1e-5)
    assert texts == expected
    assert texts != generate_batch(model, target.vlm.processor, requests, config)


def test_a_conversation_has_the_vectors_in_its_first_question(target: AttackTarget) -> None:
    prompt = target.prompts[0].model_copy(update={"history": (Round(question="what is this ?", answer="a thing"),)})
    turn = Turn.of_prompt(prompt, target.questions[0].image)
    first_id = len(target.vlm.processor.tokenizer)
    with soft_prompt(target.vlm, torch.zeros(2, target.vlm.hidden_size), "after_question"):
        ids = encode(target.vlm.processor, [turn], "left")["input_ids"][0].tolist()
    assert [index for index in ids if index >= first_id] == [first_id, first_id + 1]
    assert ids.index(first_id) < ids.index(target.vlm.processor.tokenizer.convert_tokens_to_ids("a"))


def test_states_lower_the_loss_and_leave_no_trace(target: AttackTarget) -> None:
    processor, digest = target.vlm.processor, weights_digest(target.vlm.model, target.vlm.processor)
    embeddings = target.vlm.base_model.get_input_embeddings()
    losses = []
    for _ in range(2):
        states = SoftPrompt(SoftPromptOptions(vectors=3, steps=[12, 1], batch_size=8, learning_rate=0.5)).run(target)
        losses.append([])
        for state, name in zip(states, ("soft_prompt/3/1", "soft_prompt/3"), strict=True):
            assert state.name == name
            assert state.group_ids == target.halves.second_groups(target.prompts)
            assert (state.curve, state.step) == ("soft_prompt/3", 1 if name.endswith("1") else 12)
            assert len(target.vlm.processor.tokenizer) == len(processor.tokenizer) + 3
            losses[-1].append(state.facts["loss"])
        assert target.vlm.processor is processor
        assert not embeddings._forward_hooks
        assert not embeddings._forward_pre_hooks
        assert weights_digest(target.vlm.model, target.vlm.processor) == digest
        assert all(parameter.requires_grad and parameter.grad is None for parameter in target.vlm.model.parameters())
    assert losses[0] == losses[1]
    assert losses[0][1] < losses[0][0]


def test_closing_the_iterator_early_restores_the_model(target: AttackTarget) -> None:
    processor = target.vlm.processor
    states = SoftPrompt(SoftPromptOptions(steps=[1, 2])).run(target)
    next(states)
    assert target.vlm.processor is not processor
    states.close()  # type: ignore[attr-defined]
    assert target.vlm.processor is processor
    assert not target.vlm.base_model.get_input_embeddings()._forward_hooks


def test_a_set_without_forget_examples_is_an_error(target: AttackTarget) -> None:
    dataset = dict.fromkeys(target.dataset, ())
    with raises_code("no-records", field="data"):
        next(SoftPrompt(SoftPromptOptions()).run(replace(target, dataset=dataset)))
