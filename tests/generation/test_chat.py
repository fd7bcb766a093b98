"""Chat models: every request gets a response or an error, none is sent twice, and the API key is never disclosed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from PIL import Image

from helpers import raises_code
from stub_server import stub_server
from vlm_unlearn.data.encoding import Turn
from vlm_unlearn.errors import RunError
from vlm_unlearn.generation.chat import ChatCache, ChatRequest, complete_all
from vlm_unlearn.generation.local_chat import LocalChat
from vlm_unlearn.generation.openai_chat import OpenAIChat
from vlm_unlearn.records import Prompt, Round

REQUESTS = [ChatRequest(str(number), f"question {number}") for number in range(24)]
API_KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)


def test_requests_are_answered_with_limited_concurrency() -> None:
    def answer(text: str) -> str:
        time.sleep(0.005)  # otherwise each request would be answered before the next is sent
        return text.upper()

    with stub_server(answer) as stub:
        responses, num_sent = complete_all(OpenAIChat(stub.url, "m", concurrency=7), iter(REQUESTS), None)
    assert num_sent == stub.calls == 24
    assert {id: response.text for id, response in responses.items()} == {r.id: r.text.upper() for r in REQUESTS}
    assert 1 < stub.most_at_once <= 7
    assert set(stub.keys) == {f"Bearer {API_KEY}"}


def test_failed_calls_are_retried(tmp_path: Path) -> None:
    """A third of the calls fail, each kind of failure in turn. No response is lost."""
    faults = ["429", "500", "cut", "503"]
    with stub_server(lambda text: text) as stub:
        stub.faults = lambda call: faults[call // 3 % 4] if call % 3 == 0 else ""
        chat = OpenAIChat(stub.url, "m", concurrency=8, retries=8)
        responses, _ = complete_all(chat, REQUESTS, ChatCache(tmp_path / "c.sqlite"))
    assert len(responses) == 24
    assert all(response.text == f"question {id}" for id, response in responses.items())


def test_malformed_responses_are_retried() -> None:
    """The OpenAI client accepts broken JSON and responses without choices."""
    with stub_server(lambda text: text) as stub:
        stub.faults = lambda call: {1: "garbage", 2: "empty"}.get(call, "")
        responses, _ = complete_all(OpenAIChat(stub.url, "m", concurrency=1, retries=2), REQUESTS[:2], None)
    assert stub.calls == 4
    assert [response.text for response in responses.values()] == ["question 0", "question 1"]


def test_sampling_parameters_and_seeds_are_sent_only_with_temperature(tmp_path: Path) -> None:
    cache = ChatCache(tmp_path / "c.sqlite")
    requests = [ChatRequest("a", "q", seed=1), ChatRequest("b", "q", seed=2)]
    with stub_server(lambda text: text) as stub:
        for temperature in (0.7, 0.0):
            chat = OpenAIChat(stub.url, "m", concurrency=1, temperature=temperature, top_p=0.9)
            assert complete_all(chat, requests, cache)[1] == 2
    sampling = [{key: body[key] for key in ("temperature", "top_p", "seed") if key in body} for body in stub.bodies]
    assert sampling[:2] == [{"temperature": 0.7, "top_p": 0.9, "seed": seed} for seed in (1, 2)]
    assert sampling[2:] == [{"temperature": 0}] * 2


@pytest.mark.parametrize(("text", "finish_reason"), [("It is", "length"), ("", "stop")])
def test_verbatim_accepts_truncated_and_empty_texts(text: str, finish_reason: str) -> None:
    with stub_server(lambda _: text) as stub:
        stub.finish_reason = finish_reason
        responses, _ = complete_all(OpenAIChat(stub.url, "m", verbatim=True), REQUESTS[:1], None)
    response = responses["0"]
    assert (response.text, response.finish_reason, response.error) == (text, finish_reason, None)


@pytest.mark.parametrize(
    ("fault", "error"),
    [("500", "HTTP 500"), ("400", "HTTP 400"), ("garbage", "JSON"), ("empty", "empty"), ("cut", "Connection")],
)
def test_failed_request_gets_error_and_is_sent_again(tmp_path: Path, fault: str, error: str) -> None:
    cache = ChatCache(tmp_path / "c.sqlite")
    with stub_server(lambda text: text) as stub:
        chat = OpenAIChat(stub.url, "m", concurrency=1, retries=0)
        stub.faults = lambda call: fault if call == 2 else ""
        responses, num_sent = complete_all(chat, REQUESTS[:5], cache)
        assert num_sent == 5
        failed = [response for response in responses.values() if response.text is None]
        assert len(failed) == 1
        assert error in str(failed[0].error)
        assert API_KEY not in str(failed[0].error)
        responses, num_sent = complete_all(chat, REQUESTS[:5], cache)
    assert num_sent == 1
    assert all(response.text for response in responses.values())


def test_cache_key_contains_model_text_and_image(tmp_path: Path) -> None:
    file, image = tmp_path / "c.sqlite", tmp_path / "a.png"
    cache = ChatCache(file)
    Image.new("RGB", (4, 4), "red").save(image)
    with stub_server(lambda text: text) as stub:

        def num_sent(model: str, request: ChatRequest, cache: ChatCache = cache) -> int:
            return complete_all(OpenAIChat(stub.url, model), [request], cache)[1]

        assert num_sent("m", ChatRequest("1", "q", image)) == 1
        assert num_sent("m", ChatRequest("2", "q", image)) == 0
        assert num_sent("other", ChatRequest("1", "q", image)) == 1
        assert num_sent("m", ChatRequest("1", "q")) == 1
        Image.new("RGB", (4, 4), "blue").save(image)
        assert num_sent("m", ChatRequest("1", "q", image)) == 1
        assert num_sent("m", ChatRequest("9", "q", image), ChatCache(file)) == 0
    assert stub.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert API_KEY.encode() not in file.read_bytes()


@pytest.mark.parametrize(("status", "code"), [("401", "access-denied"), ("403", "access-denied")])
def test_rejected_api_key_raises_at_once(status: str, code: str) -> None:
    with stub_server(lambda text: text) as stub:
        stub.faults = lambda call: status
        with raises_code(code) as caught:
            complete_all(OpenAIChat(stub.url, "m", concurrency=2), REQUESTS, None)
    assert stub.calls <= 4
    assert status in str(caught.value)
    assert API_KEY not in str(caught.value)


def test_unknown_model_raises_at_once() -> None:
    with stub_server(lambda text: text) as stub:
        stub.faults = lambda call: "404"
        with raises_code("model-not-found") as caught:
            complete_all(OpenAIChat(stub.url, "m", concurrency=2), REQUESTS, None)
    assert stub.calls <= 4
    assert '"m"' in str(caught.value)


def test_server_that_rejects_every_request_raises_with_its_message() -> None:
    with stub_server(lambda text: text) as stub:
        stub.faults = lambda call: "400"
        with raises_code("server-error") as caught:
            complete_all(OpenAIChat(stub.url, "m", concurrency=2), REQUESTS, None)
        for token in ("8 requests in a row", "fault, your key is Bearer ***", "max_completion_tokens"):
            assert token in str(caught.value)
        assert API_KEY not in str(caught.value)


def test_server_that_rejects_some_requests_answers_the_others() -> None:
    with stub_server(lambda text: text) as stub:
        stub.faults = lambda call: "400" if call % 2 else ""
        responses, _ = complete_all(OpenAIChat(stub.url, "m", concurrency=2), REQUESTS, None)
    assert sum(response.text is None for response in responses.values()) == 12


def test_request_option_adds_and_removes_body_keys(tmp_path: Path) -> None:
    request = {"max_tokens": None, "max_completion_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}}
    cache = ChatCache(tmp_path / "c.sqlite")
    with stub_server(lambda text: text) as stub:
        complete_all(OpenAIChat(stub.url, "m"), REQUESTS[:1], cache)
        assert complete_all(OpenAIChat(stub.url, "m", request=request), REQUESTS[:1], cache)[1] == 1  # not cached
    default, changed = stub.bodies
    assert (default["max_tokens"], "max_tokens" in changed) == (256, False)
    assert (changed["max_completion_tokens"], changed["chat_template_kwargs"]) == (9, {"enable_thinking": False})


def test_unreachable_server_raises_after_failures_in_a_row() -> None:
    """Otherwise every request would be retried for hours."""
    with raises_code("server-unreachable", RunError):
        complete_all(OpenAIChat("http://127.0.0.1:9/v1", "m", concurrency=2, retries=0), REQUESTS, None)
    responses, _ = complete_all(OpenAIChat("http://127.0.0.1:9/v1", "m", retries=0), REQUESTS[:3], None)
    assert [response.text for response in responses.values()] == [None] * 3


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "localhost:8000", "http://", "http://[::1", "http://x:99999/v1", ""]
)
def test_invalid_server_address_raises(address: str) -> None:
    with raises_code("invalid-field", field="server"):
        OpenAIChat(address, "m")


def test_api_key_with_line_break_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with raises_code("invalid-field", field="OPENAI_API_KEY") as caught:
        OpenAIChat("http://localhost:8000/v1", "m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", [["a list"], {"an": "object"}, 7])
def test_content_other_than_text_is_an_error(content: object, tmp_path: Path) -> None:
    def answer(text: str) -> object:
        return content if text == "question 1" else "fine"

    with stub_server(answer) as stub:  # type: ignore[arg-type]
        chat = OpenAIChat(stub.url, "m", retries=0)
        responses, _ = complete_all(chat, REQUESTS[:3], ChatCache(tmp_path / "c.sqlite"))
    assert [responses[id].text for id in ("0", "1", "2")] == ["fine", None, "fine"]


def test_truncated_text_is_an_error() -> None:
    with stub_server(lambda text: "It is answer 1 that") as stub:
        stub.finish_reason = "length"
        responses, _ = complete_all(OpenAIChat(stub.url, "m", max_tokens=5), REQUESTS[:1], None)
    assert responses["0"].text is None
    assert "5 tokens" in str(responses["0"].error)


def test_broken_cache_file_raises(tmp_path: Path) -> None:
    file = tmp_path / "c.sqlite"
    file.write_text("not a database")
    with raises_code("file-unreadable", RunError, file=file):
        ChatCache(file)


def test_local_model_responses_are_cached(tiny_model: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (32, 32), "red").save(image)
    cache = ChatCache(tmp_path / "c.sqlite")
    requests = [
        ChatRequest("1", "what is this ?", image),
        ChatRequest("2", "what color ?", image),
        ChatRequest("3", "what ?"),
    ]
    responses, num_sent = complete_all(LocalChat(str(tiny_model), max_tokens=4, batch_size=2), requests, cache)
    assert num_sent == 3
    assert {response.id for response in responses.values()} == {"1", "2", "3"}
    repeated, num_sent = complete_all(LocalChat(str(tiny_model), max_tokens=4, batch_size=2), requests, cache)
    assert num_sent == sum(response.text is None for response in responses.values())
    assert {id: r.text for id, r in repeated.items()} == {id: r.text for id, r in responses.items()}


def test_earlier_rounds_and_system_message_are_part_of_a_request(tiny_model: Path, tmp_path: Path) -> None:
    """A conversation is another request than its last question. No other model gets the response from the cache."""
    prompt = Prompt(id="p", group_id="p", set="s", kind="safe", question="what ?")
    history = (Round(question="who ?", answer="ann"),)
    changes: list[dict[str, object]] = [
        *({}, {"history": history}, {"system": "be brief"}, {"history": history, "system": "be brief"}),
    ]
    requests = [
        ChatRequest.of_prompt(str(number), prompt.model_copy(update=change), None)
        for number, change in enumerate(changes)
    ]
    cache = ChatCache(tmp_path / "c.sqlite")
    with stub_server(lambda text: text) as stub:
        for num_sent in (4, 0):
            assert complete_all(OpenAIChat(stub.url, "m", concurrency=1), requests, cache)[1] == num_sent
    roles = [[message["role"] for message in body["messages"]] for body in stub.bodies]
    assert roles == [
        ["user"],
        ["user", "assistant", "user"],
        ["system", "user"],
        ["system", "user", "assistant", "user"],
    ]
    texts = [[message["content"][0]["text"] for message in body["messages"]] for body in stub.bodies]
    assert texts[3] == ["be brief", "who ?", "ann", "what ?"]


def test_local_model_gets_earlier_rounds(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Turn] = []

    def generate(model: object, processor: object, batch: list[Turn], max_tokens: int) -> list[tuple[str, str]]:
        turns.extend(batch)
        return [("yes", "stop")] * len(batch)

    monkeypatch.setattr("vlm_unlearn.generation.local_chat.generate_texts", generate)
    request = ChatRequest("1", "what ?", history=(("who ?", "ann"),), system="be brief")
    complete_all(LocalChat(str(tiny_model)), [request], None)
    assert turns == [Turn("1", None, "what ?", None, (("who ?", "ann"),), "be brief")]


def test_local_model_answers_valid_requests_of_a_batch_with_invalid_ones(tiny_model: Path, tmp_path: Path) -> None:
    """A broken image is invalid. A text with the image token is valid: the token is neutralized."""
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    requests = [
        ChatRequest("1", "what is this ?", broken),
        ChatRequest("2", "what <image> ?"),
        ChatRequest("3", "what ?"),
    ]
    responses, _ = complete_all(LocalChat(str(tiny_model), max_tokens=4, batch_size=2), requests, None)
    assert set(responses) == {"1", "2", "3"}
    assert "broken.png" in str(responses["1"].error)
    for id in ("2", "3"):
        assert responses[id].error in (None, "empty answer") or "4 tokens" in str(responses[id].error)
