"""A prefilled answer is continued: the same tokens as plain transformers, in every batch, and on every backend."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import families
from helpers import raises_code
from stub_server import Stub, stub_server
from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.encoding import Turn, render
from vlm_unlearn.data.image_edits import apply_edits
from vlm_unlearn.data.images import open_image
from vlm_unlearn.evaluation.core import generate_missing
from vlm_unlearn.generation.base import GenerationRequest, build_requests, check_prompt_fields
from vlm_unlearn.generation.chat import ChatRequest
from vlm_unlearn.generation.decoding import SeededSampling, neutral_generation_config
from vlm_unlearn.generation.hf import generate_batch, generate_texts
from vlm_unlearn.generation.openai_chat import CONTINUE_ANSWER
from vlm_unlearn.generation.server import ServerBackend
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.records import BlankEdit, NoiseEdit, Prompt, Response, Round
from vlm_unlearn.store import RecordList

FAMILIES = ["llava", "qwen2_5_vl"]
NEW_TOKENS = 10
ROUNDS = (Round(question="Hi .", answer="Hello ."), Round(question="Who ?", answer="Me ."))
NOISE, OTHER_NOISE = NoiseEdit(std=100), NoiseEdit(std=100, seed=1)
CASES: list[dict[str, Any]] = [  # the lengths differ, and several have the same image or the same question
    {"prefill": "Sure, here is"},
    {},
    {"prefill": "Sure, here is a long beginning of the answer:"},
    {"image": "b.png", "prefill": "Sure, here is"},
    {"image": None, "prefill": "Sure"},
    {"question": "And this ?", "system": "Be brief .", "history": ROUNDS[:1], "image_round": 1, "prefill": "It"},
    {"question": "And this ?", "system": "Be brief .", "history": ROUNDS[:1], "prefill": "It"},
    {"question": "And this ?", "history": ROUNDS, "image_round": 1},
    {"question": "And this ?", "history": ROUNDS, "image_round": 2},
    {"image_edits": (NOISE,)},
    {"image_edits": (OTHER_NOISE,)},
    {"image_edits": (NOISE,), "prefill": "Sure, here is"},
    {"image_edits": (BlankEdit(),), "prefill": "Sure, here is"},
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
    fields = {"group_id": "g", "set": "s", "kind": "unsafe", "question": "What is this ?", "image": "a.png"}
    return [Prompt.model_validate({"id": str(number), **fields, **case}) for number, case in enumerate(CASES)]


def plain_answer(model: Any, processor: Any, prompt: Prompt, image_root: Path) -> tuple[list[int], torch.Tensor]:
    """The tokens and the scores [N, V] that plain transformers generates, with a conversation and a call of its own."""
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
    images = {}
    if prompt.image is not None:
        images = {"images": [apply_edits(open_image(image_root / prompt.image), prompt.image_edits)]}
    inputs = processor(text=[text], **images, return_tensors="pt", add_special_tokens=True)
    with neutral_generation_config(model), torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(output.scores)


class RecordingGreedy(SeededSampling):
    """Greedy decoding that records the scores [V] of every step of each row."""

    def __init__(self, num_rows: int) -> None:
        self.scores: list[list[torch.Tensor]] = [[] for _ in range(num_rows)]
        self._active = self.scores

    def select_rows(self, rows: Sequence[int]) -> SeededSampling:
        selected = copy.copy(self)
        selected._active = [self._active[row] for row in rows]
        return selected

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, row_scores in zip(self._active, scores, strict=True):
            row.append(row_scores)
        return scores


def test_tokens_and_scores_equal_those_of_plain_transformers(loaded: tuple[Any, Any], image_root: Path) -> None:
    """In every batch: next to prompts with other prefills, edits, rounds and system messages."""
    model, processor = loaded
    requests = build_requests(prompts(), {"s": image_root}, {})
    expected = [plain_answer(model, processor, request.prompt, image_root) for request in requests]
    first = torch.stack([scores[0] for _, scores in expected])
    distances = (first[:, None] - first).abs().amax(dim=-1)
    assert (distances + torch.eye(len(requests)) > 1e-2).all()  # a mix-up of two prompts is noticed
    config = GenerationConfig(max_new_tokens=NEW_TOKENS)
    for size in (1, 4, len(requests)):
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            turns = [Turn.of_prompt(request.prompt, request.image) for request in batch]
            recorder = RecordingGreedy(len(batch))
            generate_texts(model, processor, turns, NEW_TOKENS, recorder)
            for scores, (tokens, plain_scores) in zip(recorder.scores, expected[start : start + size], strict=True):
                steps = min(len(scores), len(tokens))
                torch.testing.assert_close(torch.stack(scores[:steps]), plain_scores[:steps], rtol=1e-3, atol=1e-3)
            responses = generate_batch(model, processor, batch, config)
            texts = ["".join(f" {token}" for token in tokens) for tokens, _ in expected[start : start + size]]
            assert [(response.text or "").strip() for response in responses] == [text.strip() for text in texts]


def test_the_space_after_a_prefill_stays(tiny_model: Path) -> None:
    """`Response.text` is the continuation, so that prefill and text can be put together."""
    model, processor = load_once(tiny_model)
    turns = [Turn(str(n), None, "what is this ?", None, prefill=prefill) for n, prefill in enumerate([None, "it is"])]
    (plain, _), (continued, _) = generate_texts(model, processor, turns, 4)
    assert plain == plain.strip()
    ids = processor.tokenizer(render(processor, turns[1]).text)["input_ids"]
    with torch.no_grad(), neutral_generation_config(model):
        output = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    complete = processor.batch_decode(output[:, -6:], skip_special_tokens=True)[0]
    assert f"it is{continued}" == complete.strip()


def test_special_tokens_in_a_prefill_are_text(tiny_model: Path) -> None:
    _, processor = load_once(tiny_model)
    turn = Turn("t", None, "what ?", None, prefill="it </s> is")
    text = render(processor, turn).text
    assert text.rstrip().endswith("is")
    assert "it </s> is" not in text


def test_a_template_that_drops_the_answer_gives_a_failed_response(tiny_model: Path) -> None:
    model, processor = copy.deepcopy(load_once(tiny_model))
    processor.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'][0]['text'] }}{% endif %}"
        "{% endfor %}"
    )
    attacked, plain = (
        Prompt(id=id, group_id=id, set="s", kind="unsafe", question="what ?", prefill=prefill)
        for id, prefill in (("a", "it is"), ("b", None))
    )
    responses = generate_batch(
        model, processor, build_requests([attacked, plain], {}, {}), GenerationConfig(max_new_tokens=2)
    )
    assert [response.error is None for response in responses] == [False, True]


def test_a_temperature_of_its_own_samples_as_the_temperature_of_the_suite(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_once(tiny_model)
    prompts = [Prompt(id=str(n), group_id="g", set="s", kind="unsafe", question="what is this ?") for n in range(6)]
    warm = [prompt.model_copy(update={"temperature": 1.5}) for prompt in prompts[:3]]
    greedy = [prompt.model_copy(update={"temperature": 0}) for prompt in prompts[3:]]

    def texts(prompts: list[Prompt], temperature: float) -> list[str | None]:
        config = GenerationConfig(max_new_tokens=6, temperature=temperature)
        responses = generate_batch(model, processor, build_requests(prompts, {}, {}), config)
        assert [response.prompt_id for response in responses] == [prompt.id for prompt in prompts]
        return [response.text for response in responses]

    assert texts([*warm, *prompts[3:]], 0) == [*texts(prompts[:3], 1.5), *texts(prompts[3:], 0)]
    assert texts([*prompts[:3], *greedy], 1.5) == [*texts(prompts[:3], 1.5), *texts(prompts[3:], 0)]
    assert len(set(texts(warm, 0))) == 3


# servers


def server_requests() -> list[GenerationRequest]:
    prompts = [
        Prompt(id=id, group_id=id, set="s", kind="unsafe", question=f"{id}?", prefill=prefill, temperature=temperature)
        for id, prefill, temperature in (("a", "Sure, here", None), ("b", None, None), ("c", None, 0.5))
    ]
    return build_requests(prompts, {}, {})


def answer_all(stub: Stub, **config: object) -> dict[str, Response]:
    settings = {"backend": "openai", "server": stub.url, "max_new_tokens": 7, **config}
    backend = ServerBackend("m", GenerationConfig.model_validate(settings))
    responses: list[Response] = []
    backend.run(backend.make_batches(server_requests()), responses.extend)
    return {response.prompt_id: response for response in responses}


def continuing_usage(body: dict[str, Any]) -> dict[str, int]:
    """The usage of a server that continues the last message if it is told to."""
    closed = 0 if body.get("continue_final_message") else 5
    return {"prompt_tokens": 10 + closed, "completion_tokens": 1}


def sent(stub: Stub, question: str) -> list[dict[str, Any]]:
    return [body for body in stub.bodies if any(question in str(message) for message in body["messages"])]


def test_a_server_that_continues_answers_gets_the_keys_of_vllm() -> None:
    with stub_server(lambda text: f" and {text} ") as stub:
        stub.usage_of = continuing_usage
        responses = answer_all(stub)
        assert {id: response.text for id, response in responses.items()} == {
            "a": " and Sure, here",  # with the space to the prefill
            "b": "and b?",
            "c": "and c?",
        }
        (body,) = sent(stub, "a?")
        assert body["messages"][-1] == {"role": "assistant", "content": [{"type": "text", "text": "Sure, here"}]}
        assert {key: body[key] for key in CONTINUE_ANSWER} == CONTINUE_ANSWER
        assert all(not CONTINUE_ANSWER.keys() & body.keys() for body in sent(stub, "b?"))
        assert [sent(stub, id)[0]["temperature"] for id in ("a?", "b?", "c?")] == [0, 0, 0.5]
        assert ("seed" in sent(stub, "c?")[0], "seed" in sent(stub, "b?")[0]) == (True, False)


@pytest.mark.parametrize("fault", ["ignores", "no usage", "rejects"])
def test_a_server_that_does_not_continue_answers_gives_failed_answers(fault: str) -> None:
    def reject(text: str) -> tuple[int, bytes, dict[str, str]] | None:
        return (400, b'{"error": {"message": "unknown key"}}', {}) if fault == "rejects" and "?" not in text else None

    with stub_server(lambda text: f" and {text} ") as stub:
        stub.raw = reject
        stub.usage = None if fault == "no usage" else {"prompt_tokens": 12, "completion_tokens": 1}
        responses = answer_all(stub)
        assert responses["a"].text is None
        assert "continue_final_message" in (responses["a"].error or "")
        assert responses["b"].text == "and b?"
        assert sent(stub, "a?") == []  # it is not asked another way
        assert stub.calls == 4


def test_a_server_with_keys_of_its_own_is_trusted() -> None:
    with stub_server(lambda text: f" and {text} ") as stub:
        keys = {"continue_final_message": None, "add_generation_prompt": None, "prefix": True}
        assert answer_all(stub, request=keys)["a"].text == " and Sure, here"
        (body,) = sent(stub, "a?")
        assert (body["prefix"], CONTINUE_ANSWER.keys() & body.keys()) == (True, set())
        assert stub.calls == 3


@pytest.mark.parametrize(
    "field", [{"prefill": "Sure"}, {"temperature": 0}, {"image_round": 1, "history": [Round(question="Q", answer="A")]}]
)
def test_a_backend_that_does_not_know_a_field_is_an_error(field: dict[str, Any]) -> None:
    """It would silently ask another question."""

    class Plain(ServerBackend):
        prompt_fields = frozenset()

    prompt = Prompt.model_validate({"id": "p", "group_id": "p", "set": "s", "kind": "safe", "question": "Q", **field})
    config = GenerationConfig(backend="openai", server="http://localhost:1/v1")
    with raises_code("unsupported-setting", field="generation.backend"):
        generate_missing(Plain("m", config), build_requests([prompt], {}, {}), RecordList[Response]())
    plain = prompt.model_copy(update={"prefill": None, "temperature": None, "image_round": 0})
    check_prompt_fields(Plain("m", config), build_requests([plain], {}, {}))


def test_the_image_is_in_its_round(image_root: Path) -> None:
    history = tuple(Round(question=question, answer="yes") for question in ("first", "second"))
    for image_round in range(3):
        prompt = Prompt(
            id="p",
            group_id="p",
            set="s",
            kind="safe",
            question="third",
            image="a.png",
            history=history,
            image_round=image_round,
            image_offset=2,
        )
        messages = ChatRequest.of_prompt("p", prompt, image_root / "a.png").messages()
        with_image = [
            number
            for number, message in enumerate(messages)
            if any(part["type"] == "image_url" for part in message["content"])
        ]
        assert with_image == [2 * image_round]
        assert [part.get("text", "") for part in messages[2 * image_round]["content"]][1] == ""
