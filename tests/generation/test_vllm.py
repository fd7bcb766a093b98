"""vLLM's offline engine, by a stand-in that keeps to its documented calls: vLLM itself needs a GPU and a build of its own."""

from __future__ import annotations

import base64
import importlib.machinery
import io
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.base import GenerationRequest, build_requests, sampling_seed
from vlm_unlearn.generation.vllm import VLLMBackend, tensor_parallel
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import write_json


class SamplingParams:
    """As vllm.SamplingParams: these among its keywords."""

    def __init__(
        self,
        *,
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> None:
        self.max_tokens, self.temperature, self.top_p, self.top_k, self.seed = (
            max_tokens,
            temperature,
            top_p,
            top_k,
            seed,
        )


class LLM:
    """As vllm.LLM: keywords of the engine, `chat` with one conversation and one SamplingParams a question."""

    made: list[dict[str, Any]] = []  # noqa: RUF012
    calls: list[tuple[list[Any], list[SamplingParams]]] = []  # noqa: RUF012

    def __init__(self, model: str, **options: Any) -> None:
        self.made.append({"model": model, **options})

    def chat(self, messages: list[Any], sampling_params: list[SamplingParams], use_tqdm: bool = True) -> list[Any]:
        assert len(messages) == len(sampling_params)
        self.calls.append((messages, sampling_params))
        said = [conversation[-1]["content"][-1]["text"] for conversation in messages]
        return [SimpleNamespace(outputs=[SimpleNamespace(text=f" {text}! ", finish_reason="stop")]) for text in said]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    LLM.made, LLM.calls = [], []
    return LLM


@pytest.fixture
def questions(tmp_path: Path) -> list[GenerationRequest]:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    prompts = [
        Prompt(
            id=str(number),
            group_id="g",
            set="s",
            kind="safe",
            question=f"q{number}",
            image="red.png" if number % 2 else None,
        )
        for number in range(5)
    ]
    return build_requests(prompts, {"s": tmp_path}, {"s": 2})


def run(model: Path, questions: list[GenerationRequest], **changes: object) -> list[Response]:
    backend = VLLMBackend(str(model), GenerationConfig.model_validate({"backend": "vllm", "batch_size": 1, **changes}))
    found: list[Response] = []
    backend.run(backend.make_batches(questions), found.extend)
    return found


def test_each_question_has_its_conversation_and_its_seed(
    engine: type[LLM], tiny_model: Path, questions: list[GenerationRequest]
) -> None:
    found = run(tiny_model, questions, temperature=0.8, top_p=0.9, max_new_tokens=33, seed=5)
    assert [(response.key, response.text) for response in found] == [
        (one.key, f"{one.prompt.question}!") for one in questions
    ]
    (messages, settings), *_ = engine.calls
    text, image = messages[0][0]["content"], messages[2][0]["content"]
    assert text == [{"type": "text", "text": "q0"}]
    assert image[1] == {"type": "text", "text": "q1"}
    data = base64.b64decode(image[0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (255, 0, 0)
    assert [one.seed for one in settings] == [sampling_seed(5, question) for question in questions]
    assert {(one.temperature, one.top_p, one.max_tokens) for one in settings} == {(0.8, 0.9, 33)}


def test_greedy_answers_need_no_seed(engine: type[LLM], tiny_model: Path, questions: list[GenerationRequest]) -> None:
    run(tiny_model, questions, top_p=0.9)
    assert {(one.temperature, one.top_p, one.seed) for one in engine.calls[0][1]} == {(0.0, 1.0, None)}


def test_the_engine_is_made_for_the_model(
    engine: type[LLM], tiny_model: Path, questions: list[GenerationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    run(tiny_model, questions, precision="bf16")
    (made,) = engine.made
    assert made["tensor_parallel_size"] == tensor_parallel(tiny_model)
    assert (made["model"], made["dtype"], made["limit_mm_per_prompt"]) == (str(tiny_model), "bfloat16", {"image": 1})
    assert made["generation_config"] == "vllm"  # not the model's own settings


@pytest.mark.parametrize(
    ("gpus", "heads", "expected"), [(0, 4, 1), (1, 4, 1), (3, 4, 2), (4, 4, 4), (8, 28, 7), (5, 1, 1)]
)
def test_a_model_is_split_as_its_heads_allow(
    gpus: int, heads: int, expected: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_unlearn.generation import vllm

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_attention_heads=heads))
    monkeypatch.setattr(vllm, "read_config", lambda folder: config)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert tensor_parallel(tiny_model) == expected


def test_answers_are_handed_on_batch_by_batch(
    engine: type[LLM], tiny_model: Path, questions: list[GenerationRequest]
) -> None:
    backend = VLLMBackend(str(tiny_model), GenerationConfig(backend="vllm", batch_size=1))
    groups: list[int] = []
    backend.run(backend.make_batches([*questions] * 4), lambda answers: groups.append(len(answers)))
    assert groups == [16, 16, 8]
    assert [response.key for response in backend.run_one_by_one(questions[:2])] == [("0", 0), ("0", 1)]
    assert [len(messages) for messages, _ in engine.calls[-2:]] == [1, 1]
    assert len(engine.made) == 1


def test_it_must_be_installed(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"vLLM is not installed; pip install '\.\[vllm\]'"):
        VLLMBackend(str(tiny_model), GenerationConfig(backend="vllm"))


def test_an_adapter_is_to_be_exported_first(engine: type[LLM], tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(base)})
    with pytest.raises(UserError, match=f"vlm-unlearn export {adapter} --out"):
        VLLMBackend(str(adapter), GenerationConfig(backend="vllm"))
