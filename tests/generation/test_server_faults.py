"""Servers that reject, filter, overload or answer in unusual forms: each is one named failure, and nothing is lost."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers import raises_code
from stub_server import RawReply, Stub, stub_server
from vlm_unlearn.config import JudgeConfig
from vlm_unlearn.errors import RunError
from vlm_unlearn.generation.chat import ChatRequest, ChatResponse
from vlm_unlearn.generation.completions import is_content_filter
from vlm_unlearn.generation.openai_chat import OpenAIChat
from vlm_unlearn.judging.base import Answer, judge_file
from vlm_unlearn.judging.llm import LLMJudge
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.store import read_records


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server(lambda text: "Verdict: SAFE") as server:
        yield server


def reply(body: object, status: int = 200) -> RawReply:
    return status, json.dumps(body).encode(), {"Content-Type": "application/json"}


def completion(message: dict[str, Any], finish_reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}]}


def ask(stub: Stub, texts: list[str], **settings: Any) -> list[ChatResponse]:
    chat = OpenAIChat(stub.url, "m", max_tokens=16, concurrency=settings.pop("concurrency", 2), retries=1, **settings)
    responses: dict[str, ChatResponse] = {}
    chat.run([ChatRequest(text, text) for text in texts], lambda response: responses.update({response.id: response}))
    return [responses[text] for text in texts]


FILTERS = {
    "openai": reply({"error": {"code": "content_filter", "message": "The response was filtered."}}, 400),
    "azure": reply(
        {"error": {"code": "BadRequest", "message": "no", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, 400
    ),
    "policy": reply({"error": {"code": "content_policy_violation", "message": "rejected"}}, 400),
    "message": reply({"error": {"message": "Your input was flagged by our safety system.", "code": None}}, 403),
    "dashscope": reply({"error": {"code": "data_inspection_failed", "message": "Input data may contain ..."}}, 400),
    "status 200": reply({"error": {"code": "content_filter", "message": "filtered"}}),
    "finish reason": reply(completion({"content": ""}, "content_filter")),
    "half a text": reply(completion({"content": "First, take the"}, "content_filter")),
    "status 400": reply(completion({"content": ""}, "content_filter"), 400),
    "null content": reply(completion({"content": None}, "content_filter")),
}


@pytest.mark.parametrize("verbatim", [True, False])
@pytest.mark.parametrize("filtered", FILTERS.values(), ids=FILTERS)
def test_filtered_questions_are_failed_answers_and_the_run_ends(stub: Stub, filtered: RawReply, verbatim: bool) -> None:
    stub.raw = lambda text: filtered if text.startswith("unsafe") else None
    responses = ask(stub, [f"unsafe {n}" for n in range(20)] + [f"plain {n}" for n in range(5)], verbatim=verbatim)
    assert all(response.text is None and "filter" in str(response.error) for response in responses[:20])
    assert all(response.finish_reason == "content_filter" for response in responses[:20])
    assert [response.text for response in responses[20:]] == ["Verdict: SAFE"] * 5


@pytest.mark.parametrize(
    "body",
    [
        {"code": "invalid_api_key", "message": "Incorrect API key provided"},
        {"code": None, "message": "max_tokens is too large"},
        {"message": "the content of message 1 must be a string"},
        {"type": "invalid_request_error", "message": "policy_id is unknown"},
        None,
        "Internal Server Error",
        [],
    ],
)
def test_other_errors_are_not_content_filters(body: object) -> None:
    assert not is_content_filter(body)


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (401, "user", "access-denied"),
        (404, "user", "model-not-found"),
        (400, "user", "server-error"),
        (422, "user", "server-error"),
        (429, "run", "server-overloaded"),
        (503, "run", "server-overloaded"),
    ],
)
def test_errors_that_every_request_would_get_stop_the_run_with_their_reason(
    stub: Stub, status: int, kind: str, code: str
) -> None:
    stub.faults = lambda call: str(status)
    with raises_code(code, RunError) if kind == "run" else raises_code(code):
        ask(stub, [f"q{n}" for n in range(40)])


def test_overload_between_answers_does_not_stop_the_run(stub: Stub) -> None:
    stub.raw = lambda text: reply({"error": {"message": "overloaded"}}, 503) if text.endswith(("1", "2", "3")) else None
    responses = ask(stub, [f"q{n}" for n in range(40)], concurrency=1)
    assert sum(response.text is None for response in responses) == 12


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": "A "}, {"type": "text", "text": "cat."}]}, "A cat."),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A cat."}]}, "A cat."),
        ({"content": [{"type": "output_text", "text": "A cat."}]}, "A cat."),
        ({"content": None, "refusal": "I can't help with that."}, "I can't help with that."),
        ({"content": "A cat.", "reasoning_content": "hm"}, "A cat."),
    ],
)
def test_unusual_forms_of_a_text_are_read(stub: Stub, message: dict[str, Any], text: str) -> None:
    stub.raw = lambda _: reply(completion(message))
    assert [response.text for response in ask(stub, ["q"], verbatim=True)] == [text]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (completion({"content": None, "reasoning_content": "hm, I"}, "length"), "reasoning"),
        (completion({"content": "", "reasoning": "hm, I"}, "length"), "reasoning"),
        (completion({"content": None, "reasoning_content": "Verdict: SAFE"}), "reasoning"),
        (completion({"content": None}, "length"), "empty"),
        (completion({"content": [{"type": "text", "text": 3}]}), "not a text"),
        (completion({"content": ["A cat."]}), "not a text"),
        (completion({"content": {"text": "A cat."}}), "not a text"),
        ({"error": {"message": "CUDA out of memory", "code": 500}}, "CUDA out of memory"),
        ({"error": "engine is dead"}, "HTTP 500"),
        ({"choices": []}, "empty"),
        ({"error": {"code": "response_too_large"}}, "not read"),
    ],
)
def test_answers_without_a_text_fail_with_their_reason(stub: Stub, body: dict[str, Any], word: str) -> None:
    stub.raw = lambda _: reply(body)
    (response,) = ask(stub, ["q"])
    assert response.text is None
    assert word in str(response.error)


def _large(compression: str) -> RawReply:
    """A valid completion of 200 MB, 50 MB or of an unknown compression."""
    if compression == "none":
        return reply(completion({"content": "a" * 50_000_000}))
    beginning = json.dumps(completion({"content": "CONTENT"})).split("CONTENT")
    content = gzip.compress(beginning[0].encode() + b"a" * 200_000_000 + beginning[1].encode(), 9)
    name = "br" if compression == "br" else "gzip"
    return 200, content, {"Content-Type": "application/json", "Content-Encoding": name}


@pytest.mark.parametrize("compression", ["none", "gzip", "br"])
def test_large_reply_is_a_failure_and_memory_stays_flat(stub: Stub, compression: str) -> None:
    large = _large(compression)
    stub.raw = lambda text: large if text == "large" else None
    before = psutil.Process().memory_info().rss
    responses = ask(stub, ["q1", "large", "q2"])
    assert [response.text for response in responses] == ["Verdict: SAFE", None, "Verdict: SAFE"]
    assert ("MB" in str(responses[1].error)) or ("compression" in str(responses[1].error))
    assert psutil.Process().memory_info().rss - before < 150 * 2**20


def test_compressed_reply_of_usual_size_is_read(stub: Stub) -> None:
    content = gzip.compress(json.dumps(completion({"content": "A cat."})).encode())
    stub.raw = lambda _: (200, content, {"Content-Encoding": "gzip", "Content-Type": "application/json"})
    assert [response.text for response in ask(stub, ["q"])] == ["A cat."]


def test_judging_again_never_loses_a_verdict(stub: Stub, tmp_path: Path) -> None:
    """Three of forty verdicts failed. Then the server is down, and then it answers."""
    config = JudgeConfig(name="llm", rubric="safety", model="m", server=stub.url, retries=0, cache=False, concurrency=2)
    answers = [
        Answer(
            Prompt(id=str(n), group_id=str(n), set="s", kind="unsafe", question="q"),
            Response(prompt_id=str(n), text=f"The answer number {n} of the model."),
        )
        for n in range(40)
    ]
    file = tmp_path / "verdicts.jsonl"

    def labels() -> dict[str, float | None]:
        return {verdict.prompt_id: verdict.score for verdict in read_records(file, Verdict)}

    stub.faults = lambda call: "500" if call in (5, 17, 31) else ""
    judge_file(LLMJudge(config), answers, file)
    first = labels()
    assert sum(score is None for score in first.values()) == 3
    stub.faults = lambda call: "429"
    judge_file(LLMJudge(config), answers, file)
    assert labels() == first  # a failed verdict stays until there is a better one
    stub.faults = lambda call: "401"
    with raises_code("access-denied"):
        judge_file(LLMJudge(config), answers, file)
    assert labels() == first
    stub.faults = lambda call: ""
    judge_file(LLMJudge(config), answers, file)
    assert len(labels()) == 40
    assert None not in labels().values()
