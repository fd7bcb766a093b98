"""Asking a server: everything is answered or explicitly not, nothing twice, and the key goes nowhere."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from PIL import Image

from stub_server import stub_server
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.generation.chat import ChatCache, ChatRequest, OpenAIChat, complete_all

ASKS = [ChatRequest(str(number), f"question {number}") for number in range(60)]
SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def test_all_are_answered_at_most_so_many_at_once() -> None:
    def answer(text: str) -> str:
        time.sleep(0.005)  # or each question is answered before the next is sent
        return text.upper()

    with stub_server(answer) as stub:
        replies, asked = complete_all(OpenAIChat(stub.url, "m", concurrency=7), iter(ASKS), None)
    assert asked == stub.calls == 60
    assert {id: reply.text for id, reply in replies.items()} == {ask.id: ask.text.upper() for ask in ASKS}
    assert 1 < stub.most_at_once <= 7
    assert set(stub.keys) == {f"Bearer {SECRET}"}


def test_faults_are_retried(tmp_path: Path) -> None:
    """A third of the calls fail, in every way: nothing is lost."""
    faults = ["429", "500", "cut", "503"]
    with stub_server(lambda text: text) as stub:
        stub.faults = lambda call: faults[call // 3 % 4] if call % 3 == 0 else ""
        replies, _ = complete_all(
            OpenAIChat(stub.url, "m", concurrency=8, retries=8), ASKS, ChatCache(tmp_path / "c.sqlite")
        )
    assert len(replies) == 60
    assert all(reply.text == f"question {id}" for id, reply in replies.items())


def test_what_is_no_answer_is_asked_again() -> None:
    """Broken JSON and an answer without choices: the client takes both for answers."""
    with stub_server(lambda text: text) as stub:
        stub.faults = lambda call: {1: "garbage", 2: "empty"}.get(call, "")
        replies, _ = complete_all(OpenAIChat(stub.url, "m", concurrency=1, retries=2), ASKS[:2], None)
    assert stub.calls == 4
    assert [reply.text for reply in replies.values()] == ["question 0", "question 1"]


def test_a_sampled_answer_has_a_seed_of_its_own(tmp_path: Path) -> None:
    cache = ChatCache(tmp_path / "c.sqlite")
    with stub_server(lambda text: text) as stub:
        for temperature in (0.7, 0.0):
            chat = OpenAIChat(stub.url, "m", concurrency=1, temperature=temperature, top_p=0.9)
            assert complete_all(chat, [ChatRequest("a", "q", seed=1), ChatRequest("b", "q", seed=2)], cache)[1] == 2
    sampling = [{key: body[key] for key in ("temperature", "top_p", "seed") if key in body} for body in stub.bodies]
    assert sampling[:2] == [{"temperature": 0.7, "top_p": 0.9, "seed": seed} for seed in (1, 2)]
    assert sampling[2:] == [{"temperature": 0}] * 2


@pytest.mark.parametrize(("said", "finish_reason"), [("It is", "length"), ("", "stop")])
def test_what_a_model_under_test_says_is_its_answer(said: str, finish_reason: str) -> None:
    with stub_server(lambda text: said) as stub:
        stub.finish_reason = finish_reason
        replies, _ = complete_all(OpenAIChat(stub.url, "m", verbatim=True), ASKS[:1], None)
    assert (replies["0"].text, replies["0"].finish_reason, replies["0"].error) == (said, finish_reason, None)


@pytest.mark.parametrize(
    ("fault", "error"),
    [("500", "HTTP 500"), ("400", "HTTP 400"), ("garbage", "JSON"), ("empty", "empty answer"), ("cut", "Connection")],
)
def test_what_fails_for_good_is_explicit_and_asked_again(tmp_path: Path, fault: str, error: str) -> None:
    cache = ChatCache(tmp_path / "c.sqlite")
    with stub_server(lambda text: text) as stub:
        chat = OpenAIChat(stub.url, "m", concurrency=1, retries=0)
        stub.faults = lambda call: fault if call == 2 else ""
        replies, asked = complete_all(chat, ASKS[:5], cache)
        assert asked == 5
        failed = [reply for reply in replies.values() if reply.text is None]
        assert len(failed) == 1
        assert error in str(failed[0].error)
        assert SECRET not in str(failed[0].error)
        replies, asked = complete_all(chat, ASKS[:5], cache)
    assert asked == 1
    assert all(reply.text for reply in replies.values())


def test_the_cache_knows_model_text_and_image(tmp_path: Path) -> None:
    cache = ChatCache(tmp_path / "c.sqlite")
    image = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(image)
    with stub_server(lambda text: text) as stub:

        def asked(model: str, ask: ChatRequest) -> int:
            return complete_all(OpenAIChat(stub.url, model), [ask], cache)[1]

        assert [asked("m", ChatRequest("1", "q", image)), asked("m", ChatRequest("2", "q", image))] == [1, 0]
        assert asked("other", ChatRequest("1", "q", image)) == 1
        assert asked("m", ChatRequest("1", "q")) == 1
        Image.new("RGB", (4, 4), "blue").save(image)
        assert asked("m", ChatRequest("1", "q", image)) == 1
        assert (
            complete_all(OpenAIChat(stub.url, "m"), [ChatRequest("9", "q", image)], ChatCache(tmp_path / "c.sqlite"))[1]
            == 0
        )
    assert stub.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert SECRET.encode() not in (tmp_path / "c.sqlite").read_bytes()


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_refused_key_ends_it_at_once(status: str) -> None:
    with stub_server(lambda text: text) as stub:
        stub.faults = lambda call: status
        with pytest.raises(UserError, match=f"the server answered {status}") as error:
            complete_all(OpenAIChat(stub.url, "m", concurrency=2), ASKS, None)
    assert stub.calls <= 4
    assert SECRET not in str(error.value)


def test_a_server_that_calls_all_wrong_is_given_up_on_with_its_reason() -> None:
    with stub_server(lambda text: text) as stub:
        stub.faults = lambda call: "400"
        with pytest.raises(
            UserError, match=r"refused 8 questions in a row .*fault, your key is Bearer \*\*\*.*max_completion_tokens"
        ) as error:
            complete_all(OpenAIChat(stub.url, "m", concurrency=2), ASKS, None)
        assert SECRET not in str(error.value)
        stub.faults = lambda call: "400" if call % 2 else ""
        replies, _ = complete_all(
            OpenAIChat(stub.url, "m", concurrency=2), ASKS, None
        )  # some are wrong: the others are answered
    assert sum(reply.text is None for reply in replies.values()) == 30


def test_what_a_server_wants_is_added_or_left_out(tmp_path: Path) -> None:
    request = {"max_tokens": None, "max_completion_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}}
    cache = ChatCache(tmp_path / "c.sqlite")
    with stub_server(lambda text: text) as stub:
        complete_all(OpenAIChat(stub.url, "m"), ASKS[:1], cache)
        assert (
            complete_all(OpenAIChat(stub.url, "m", request=request), ASKS[:1], cache)[1] == 1
        )  # another request, another reply
    before, after = stub.bodies
    assert (before["max_tokens"], "max_tokens" in after) == (256, False)
    assert (after["max_completion_tokens"], after["chat_template_kwargs"]) == (9, {"enable_thinking": False})


def test_no_server_is_given_up_on() -> None:
    """Not after hours of retries for every question."""
    with pytest.raises(RunError, match="8 questions in a row were not answered"):
        complete_all(OpenAIChat("http://127.0.0.1:9/v1", "m", concurrency=2, retries=0), ASKS, None)
    replies, _ = complete_all(OpenAIChat("http://127.0.0.1:9/v1", "m", retries=0), ASKS[:3], None)
    assert [reply.text for reply in replies.values()] == [None] * 3


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "localhost:8000", "http://", "http://[::1", "http://x:99999/v1", ""]
)
def test_an_address_must_be_one(address: str) -> None:
    with pytest.raises(UserError, match="begins with http"):
        OpenAIChat(address, "m")


@pytest.mark.parametrize("content", [["a list"], {"an": "object"}, 7])
def test_content_that_is_no_text_is_an_error(content: object, tmp_path: Path) -> None:
    with stub_server(lambda text: content if text == "question 1" else "fine") as stub:  # type: ignore[arg-type,return-value]
        replies, _ = complete_all(OpenAIChat(stub.url, "m", retries=0), ASKS[:3], ChatCache(tmp_path / "c.sqlite"))
    assert [replies[id].text for id in ("0", "1", "2")] == ["fine", None, "fine"]


def test_a_local_model_answers_and_is_cached(tiny_model: Path, tmp_path: Path) -> None:
    from vlm_unlearn.generation.local_chat import LocalChat

    image = tmp_path / "a.png"
    Image.new("RGB", (32, 32), "red").save(image)
    cache = ChatCache(tmp_path / "c.sqlite")
    asks = [
        ChatRequest("1", "what is this ?", image),
        ChatRequest("2", "what colour ?", image),
        ChatRequest("3", "what ?"),
    ]
    first, asked = complete_all(LocalChat(str(tiny_model), max_tokens=4, batch_size=2), asks, cache)
    assert asked == 3
    assert {reply.id for reply in first.values()} == {"1", "2", "3"}
    again, asked = complete_all(LocalChat(str(tiny_model), max_tokens=4, batch_size=2), asks, cache)
    assert asked == sum(reply.text is None for reply in first.values())
    assert {id: reply.text for id, reply in again.items()} == {id: reply.text for id, reply in first.items()}


def test_a_local_model_answers_the_rest(tiny_model: Path, tmp_path: Path) -> None:
    """A broken image, or a text that holds the image token, is one reply with an error."""
    from vlm_unlearn.generation.local_chat import LocalChat

    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    asks = [ChatRequest("1", "what is this ?", broken), ChatRequest("2", "what <image> ?"), ChatRequest("3", "what ?")]
    replies, _ = complete_all(LocalChat(str(tiny_model), max_tokens=4, batch_size=2), asks, None)
    assert set(replies) == {"1", "2", "3"}
    assert "not an image" in str(replies["1"].error)
    assert "image placeholder" in str(replies["2"].error)
    assert replies["3"].error in (None, "empty answer") or "the reply was cut at 4 tokens" in str(replies["3"].error)


def test_a_cut_reply_is_no_reply() -> None:
    with stub_server(lambda text: "It is answer 1 that") as stub:
        stub.finish_reason = "length"
        replies, _ = complete_all(OpenAIChat(stub.url, "m", max_tokens=5), ASKS[:1], None)
    assert replies["0"].text is None
    assert "cut at 5 tokens" in str(replies["0"].error)
