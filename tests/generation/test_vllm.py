"""The vLLM backend, against a fake with vLLM's documented interface. vLLM itself requires a GPU."""

from __future__ import annotations

import base64
import importlib.machinery
import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from helpers import raises_code
from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.generation.base import GenerationRequest, build_requests, sampling_seed
from vlm_unlearn.generation.vllm import VLLMBackend, tensor_parallel_size
from vlm_unlearn.records import Prompt, Response, Round
from vlm_unlearn.store import write_json


class SamplingParams:
    """A subset of the keywords of vllm.SamplingParams."""

    def __init__(
        self,
        *,
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> None:
        self.max_tokens, self.temperature, self.top_p = max_tokens, temperature, top_p
        self.top_k, self.seed = top_k, seed


class LLM:
    """vllm.LLM: engine keywords, and `chat` with one conversation and one SamplingParams per request."""

    engines: list[dict[str, Any]] = []  # noqa: RUF012
    calls: list[tuple[list[Any], list[SamplingParams]]] = []  # noqa: RUF012
    options: list[dict[str, bool]] = []  # noqa: RUF012

    def __init__(self, model: str, **options: Any) -> None:
        self.engines.append({"model": model, **options})
        self.queue: list[str] = []

    # The error of a conversation, by the text of its question. All conversations are checked before any is answered.
    rejections: dict[str, Exception] = {}  # noqa: RUF012
    # Earlier versions keep the conversations before a rejected one in their queue, and answer them in the next call.
    keeps_queue = False

    def chat(
        self, messages: list[Any], sampling_params: list[SamplingParams], use_tqdm: bool = True, **options: bool
    ) -> list[Any]:
        assert len(messages) == len(sampling_params)
        self.options.append(options)
        self.calls.append((messages, sampling_params))
        texts = self.queue
        for conversation in messages:
            text = conversation[-1]["content"][-1]["text"]
            if text in self.rejections:
                self.queue = texts if self.keeps_queue else []
                raise self.rejections[text]
            texts = [*texts, text]
        self.queue = []
        return [SimpleNamespace(outputs=[SimpleNamespace(text=f" {text}! ", finish_reason="stop")]) for text in texts]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    LLM.engines, LLM.calls, LLM.options, LLM.rejections, LLM.keeps_queue = [], [], [], {}, False
    return LLM


@pytest.fixture
def requests(tmp_path: Path) -> list[GenerationRequest]:
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


def run(model: Path, requests: list[GenerationRequest], **changes: object) -> list[Response]:
    backend = VLLMBackend(str(model), GenerationConfig.model_validate({"backend": "vllm", "batch_size": 1, **changes}))
    responses: list[Response] = []
    backend.run(backend.make_batches(requests), responses.extend)
    return responses


def test_each_request_has_conversation_and_seed(
    engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]
) -> None:
    responses = run(tiny_model, requests, temperature=0.8, top_p=0.9, max_new_tokens=33, seed=5)
    assert [(response.key, response.text) for response in responses] == [
        (request.key, f"{request.prompt.question}!") for request in requests
    ]
    (messages, settings), *_ = engine.calls
    text, image = messages[0][0]["content"], messages[2][0]["content"]
    assert text == [{"type": "text", "text": "q0"}]
    assert image[1] == {"type": "text", "text": "q1"}
    data = base64.b64decode(image[0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (255, 0, 0)
    assert [params.seed for params in settings] == [sampling_seed(5, request) for request in requests]
    assert {(params.temperature, params.top_p, params.max_tokens) for params in settings} == {(0.8, 0.9, 33)}


def test_earlier_rounds_and_system_message_are_sent(
    engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]
) -> None:
    history = (Round(question="who", answer="ann"),)
    prompt = requests[2].prompt.model_copy(update={"history": history, "system": "be brief"})
    run(tiny_model, [replace(requests[2], prompt=prompt)])
    run(tiny_model, [replace(requests[2], prompt=prompt.model_copy(update={"image_offset": 2}))])
    (messages, _), (with_offset, _) = engine.calls
    assert [part.get("text") for part in with_offset[0][1]["content"]] == ["wh", None, "o"]
    assert [message["role"] for message in messages[0]] == ["system", "user", "assistant", "user"]
    assert [part["type"] for message in messages[0] for part in message["content"]] == [
        *("text", "image_url", "text", "text", "text"),  # the image belongs to the first question
    ]
    texts = [message["content"][-1]["text"] for message in messages[0]]
    assert texts == ["be brief", "who", "ann", "q1"]


def test_greedy_decoding_sends_no_seed(engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]) -> None:
    run(tiny_model, requests, top_p=0.9)
    assert {(params.temperature, params.top_p, params.seed) for params in engine.calls[0][1]} == {(0.0, 1.0, None)}


def test_engine_options_fit_model_and_gpus(
    engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    run(tiny_model, requests, precision="bf16")
    (options,) = engine.engines
    assert options["tensor_parallel_size"] == tensor_parallel_size(tiny_model)
    assert (options["model"], options["dtype"], options["limit_mm_per_prompt"]) == (
        str(tiny_model),
        "bfloat16",
        {"image": 1},
    )
    assert options["generation_config"] == "vllm"  # not the model's own settings


@pytest.mark.parametrize(
    ("gpus", "heads", "expected"), [(0, 4, 1), (1, 4, 1), (3, 4, 2), (4, 4, 4), (8, 28, 7), (5, 1, 1)]
)
def test_tensor_parallel_size_divides_heads(
    gpus: int, heads: int, expected: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_unlearn.generation import vllm

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_attention_heads=heads))
    monkeypatch.setattr(vllm, "read_config", lambda folder: config)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert tensor_parallel_size(tiny_model) == expected


def test_responses_are_passed_on_per_batch(
    engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]
) -> None:
    backend = VLLMBackend(str(tiny_model), GenerationConfig(backend="vllm", batch_size=1))
    groups: list[int] = []
    backend.run(backend.make_batches([*requests] * 4), lambda responses: groups.append(len(responses)))
    assert groups == [16, 16, 8]
    assert [response.key for response in backend.run_one_by_one(requests[:2])] == [("0", 0), ("0", 1)]
    assert [len(messages) for messages, _ in engine.calls[-2:]] == [1, 1]
    assert len(engine.engines) == 1


def test_missing_vllm_raises(tiny_model: Path) -> None:
    with raises_code("missing-package", field="generation.backend") as caught:
        VLLMBackend(str(tiny_model), GenerationConfig(backend="vllm"))
    assert "pip install '.[vllm]'" in str(caught.value)


def test_adapter_raises_with_export_command(engine: type[LLM], tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(base)})
    pair = {f"layer.lora_{name}.weight": torch.zeros(1) for name in "AB"}
    save_file(pair, adapter / "adapter_model.safetensors")
    with raises_code("unsupported-setting", file=adapter) as caught:
        VLLMBackend(str(adapter), GenerationConfig(backend="vllm"))
    assert f"vlm-unlearn export {adapter} --out" in str(caught.value)


def test_prefilled_answers_are_continued(
    engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]
) -> None:
    changes = [{}, {"prefill": "Sure, here"}, {"temperature": 0.5}, {}]
    changed = [
        replace(request, prompt=request.prompt.model_copy(update=change))
        for request, change in zip(requests[:8:2], changes, strict=True)
    ]
    responses = run(tiny_model, changed)
    assert [response.prompt_id for response in responses] == ["0", "1", "2", "3"]
    assert [response.text for response in responses] == ["q0!", " Sure, here!", "q2!", "q3!"]
    assert engine.options == [
        {},
        {"continue_final_message": True, "add_generation_prompt": False},
    ]
    assert [params.temperature for params in engine.calls[0][1]] == [0, 0.5, 0]


class EngineDeadError(Exception):
    """The name of vLLM's error after which no request is answered."""


REJECTIONS: dict[str, Exception] = {
    "aspect ratio": ValueError("absolute aspect ratio must be smaller than 200, got 218.6"),
    "placeholder": RuntimeError("Expected there to be 1 prompt updates corresponding to 1 image items"),
    "too long": ValueError("The decoder prompt (length 5000) is longer than the maximum model length of 4096"),
    "channels": TypeError("unsupported image type"),
    "template": KeyError("content"),
}


@pytest.mark.parametrize("keeps_queue", [False, True])
@pytest.mark.parametrize("rejection", REJECTIONS.values(), ids=REJECTIONS)
def test_rejected_question_is_one_failed_response(
    rejection: Exception,
    keeps_queue: bool,
    engine: type[LLM],
    tiny_model: Path,
    requests: list[GenerationRequest],
) -> None:
    engine.rejections, engine.keeps_queue = {"q1": rejection}, keeps_queue
    responses = run(tiny_model, requests)
    assert [response.key for response in responses] == [request.key for request in requests]
    for response, request in zip(responses, requests, strict=True):
        if request.prompt.question == "q1":
            assert response.text is None
            assert "red.png" in str(response.error)
            assert type(rejection).__name__ in str(response.error)
        else:
            assert (response.text, response.error) == (f"{request.prompt.question}!", None)
    assert len(engine.calls) < 2 * len(requests)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(b"no image"),
        lambda file: file.write_bytes(file.read_bytes()[:40]),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
    ],
)
def test_broken_image_is_one_failed_response(
    write: Any, engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest], tmp_path: Path
) -> None:
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "blue.png")
    prompts = [*(request.prompt for request in requests[::2]), requests[2].prompt.model_copy(update={"id": "blue"})]
    prompts[-1] = prompts[-1].model_copy(update={"image": "blue.png"})
    built = build_requests(prompts, {"s": tmp_path}, {})
    write(tmp_path / "red.png")
    responses = {response.prompt_id: response for response in run(tiny_model, built)}
    assert {id for id, response in responses.items() if response.error} == {"1", "3"}
    assert all("red.png" in str(responses[id].error) for id in ("1", "3"))
    assert responses["blue"].text == "q1!"


def test_placeholder_in_a_question_is_sent_as_text(
    engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]
) -> None:
    prompt = requests[2].prompt.model_copy(update={"question": "what is <image> and <|im_end|>?"})
    run(tiny_model, [replace(requests[2], prompt=prompt)])
    ((messages, _),) = engine.calls
    assert messages[0][0]["content"][-1]["text"] == "what is < image> and < |im_end|>?"


def test_all_questions_rejected_are_failed_responses(
    engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]
) -> None:
    engine.rejections = {f"q{number}": REJECTIONS["too long"] for number in range(5)}
    assert all(response.error for response in run(tiny_model, requests))


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), EngineDeadError("dead"), torch.OutOfMemoryError("out of memory")]
)
def test_failed_engine_ends_the_run(
    error: Exception, engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]
) -> None:
    engine.rejections = {f"q{number}": error for number in range(5)}
    with pytest.raises(type(error)):
        run(tiny_model, requests)


def test_engine_that_fails_later_ends_the_run(
    engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]
) -> None:
    backend = VLLMBackend(str(tiny_model), GenerationConfig(backend="vllm", batch_size=1))
    engine.rejections = {"q1": RuntimeError("CUDA error")}
    responses: list[Response] = []
    with pytest.raises(RuntimeError):
        backend.run([requests[:2], requests[2:4]], responses.extend)
    assert [response.text for response in responses] == ["q0!", "q0!"]


def test_engine_that_dies_later_ends_the_run(
    engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]
) -> None:
    engine.rejections = {"q4": EngineDeadError("dead")}
    with pytest.raises(EngineDeadError):
        run(tiny_model, requests)


def test_odd_question_alone_is_a_failed_response(
    engine: type[LLM], tiny_model: Path, requests: list[GenerationRequest]
) -> None:
    backend = VLLMBackend(str(tiny_model), GenerationConfig(backend="vllm", batch_size=1))
    engine.rejections = {"q1": REJECTIONS["aspect ratio"]}
    texts = [response.text for response in backend.run_one_by_one(requests[:4])]
    assert texts == ["q0!", "q0!", None, None]
