"""A prefilled answer is continued: the same tokens as plain transformers, in every batch, and on every backend."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import families
from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.images import open_image
from vlm_unlearn.generation.base import build_requests
from vlm_unlearn.generation.decoding import neutral_generation_config
from vlm_unlearn.generation.hf import generate_batch
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.records import Prompt, Round

FAMILIES = ["llava", "qwen2_5_vl"]
NEW_TOKENS = 10
# Question, image, system message, earlier rounds, round of the image, prefill. The lengths differ on purpose.
CASES: list[tuple[str, str | None, str | None, tuple[tuple[str, str], ...], int, str | None]] = [
    ("What is this ?", "a.png", None, (), 0, "Sure, here is"),
    ("What is this ?", "a.png", None, (), 0, None),
    ("What is this ?", "a.png", None, (), 0, "Sure, here is a long beginning of the answer:"),
    ("What is this ?", "b.png", None, (), 0, "Sure, here is"),
    ("What is this ?", None, None, (), 0, "Sure"),
    ("And this ?", "a.png", "Be brief .", (("Hi .", "Hello ."),), 1, "It"),
    ("And this ?", "a.png", "Be brief .", (("Hi .", "Hello ."),), 0, "It"),
    ("And this ?", "a.png", None, (("Hi .", "Hello ."), ("Who ?", "Me .")), 1, None),
]


@pytest.fixture(scope="module")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in ("a.png", "b.png"):
        pixels = bytes(torch.randint(256, (3 * 40 * 40,), generator=generator).tolist())
        Image.frombytes("RGB", (40, 40), pixels).save(root / name)
    return root


@functools.cache
def load_once(folder: Path) -> tuple[Any, Any]:
    return load_model(folder, "fp32").eval(), load_processor(folder)


@pytest.fixture(params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Model and processor. The processor decodes tokens to numbers, since random bytes are rarely text."""
    model, processor = copy.deepcopy(load_once(families.shared_folder(request.param, tmp_path_factory)))
    processor.batch_decode = lambda rows, **_: [
        "".join(f" {token}" for token in row.tolist() if token != processor.tokenizer.pad_token_id) for row in rows
    ]
    return model, processor


def prompts() -> list[Prompt]:
    return [
        Prompt(
            id=str(number),
            group_id="g",
            set="s",
            kind="unsafe",
            question=question,
            image=image,
            system=system,
            history=tuple(Round(question=q, answer=a) for q, a in history),
            image_round=image_round,
            prefill=prefill,
        )
        for number, (question, image, system, history, image_round, prefill) in enumerate(CASES)
    ]


def plain_tokens(model: Any, processor: Any, prompt: Prompt, image_root: Path) -> str:
    """The tokens that plain transformers generates, with a conversation and a call of its own."""
    messages: list[dict[str, Any]] = []
    if prompt.system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": prompt.system}]})
    questions = [*(turn.question for turn in prompt.history), prompt.question]
    for number, question in enumerate(questions):
        content = [{"type": "text", "text": question}]
        if prompt.image is not None and number == prompt.image_round:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        if number < len(prompt.history):
            answer = [{"type": "text", "text": prompt.history[number].answer}]
            messages.append({"role": "assistant", "content": answer})
    options: dict[str, Any] = {"add_generation_prompt": True}
    if prompt.prefill is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": prompt.prefill}]})
        options = {"continue_final_message": True}
    text = processor.apply_chat_template(messages, tokenize=False, **options)
    if prompt.history and processor.tokenizer.eos_token not in text:
        # LLaVA-1.5's template does not close an answer. Its training does, with the end-of-sequence token.
        for turn in prompt.history:
            text = text.replace(turn.answer, turn.answer + processor.tokenizer.eos_token, 1)
    images = {} if prompt.image is None else {"images": [open_image(image_root / prompt.image)]}
    inputs = processor(text=[text], **images, return_tensors="pt", add_special_tokens=True)
    inputs.pop("token_type_ids", None)
    with neutral_generation_config(model), torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return "".join(f" {token}" for token in output[0, inputs["input_ids"].shape[1] :].tolist())


def test_a_prefilled_answer_equals_that_of_plain_transformers(loaded: tuple[Any, Any], image_root: Path) -> None:
    model, processor = loaded
    requests = build_requests(prompts(), {"s": image_root}, {})
    config = GenerationConfig(max_new_tokens=NEW_TOKENS)
    expected = [plain_tokens(model, processor, request.prompt, image_root) for request in requests]
    assert len(set(expected)) >= len(expected) - 1  # of two prompts, the random model may repeat the same tokens
    for size in (1, 3, len(requests)):
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        responses = [item for batch in batches for item in generate_batch(model, processor, batch, config)]
        assert [(response.text or "").strip() for response in responses] == [text.strip() for text in expected]
