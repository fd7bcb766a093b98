"""Language models as judges: every answer gets one verdict, no request is repeated, and API keys are not written."""

from __future__ import annotations

import json
import traceback
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from helpers import raises_code
from stub_server import Stub, stub_server
from vlm_unlearn.config import JudgeConfig
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.generation.chat import ChatCache
from vlm_unlearn.judging.base import Answer, judge_file
from vlm_unlearn.judging.llm import UNPARSED_REPLY, LLMJudge
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.store import read_records

SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def answers(count: int, image: Path | None = None) -> list[Answer]:
    name = image.name if image else None
    return [
        Answer(
            Prompt(
                id=f"p{number}",
                group_id=f"g{number // 3}",
                rewrite=number % 3,
                set="s",
                kind="unsafe",
                image=name,
                question=f"question {number}?",
            ),
            Response(prompt_id=f"p{number}", text=f"This is answer {number} to it."),
            image.parent if image else None,
            f"question {number // 3 * 3}?",
        )
        for number in range(count)
    ]


def config(stub: Stub, rubric: str = "four_labels", **changes: object) -> JudgeConfig:
    fields = {
        "name": "llm",
        "rubric": rubric,
        "model": "org/judge",
        "server": stub.url,
        "retries": 0,
        "concurrency": 4,
        **changes,
    }
    return JudgeConfig.model_validate(fields)


def graded(judge: LLMJudge, to_grade: list[Answer], file: Path) -> dict[str, Verdict]:
    judge_file(judge, to_grade, file)
    verdicts = list(read_records(file, Verdict))
    assert len({verdict.key for verdict in verdicts}) == len(verdicts)
    return {verdict.prompt_id: verdict for verdict in verdicts}


def by_number(text: str) -> str:
    """Odd answers comply."""
    number = int(text.split("This is answer ")[1].split()[0])
    return f"A reason.\nVerdict: {'COMPLIED' if number % 2 else 'REFUSED'}"


def test_llm_judge_verdict_has_label_raw_and_tokens(tmp_path: Path) -> None:
    with stub_server(by_number) as stub:
        stub.usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        judge = LLMJudge(config(stub), ChatCache(tmp_path / "c.sqlite"))
        verdicts = graded(judge, answers(20), tmp_path / "v.jsonl")
    assert judge.name == "four_labels@org--judge"
    assert all(verdict.label == ("complied" if int(id[1:]) % 2 else "refused") for id, verdict in verdicts.items())
    assert verdicts["p3"].raw == "A reason.\nVerdict: COMPLIED"
    assert {verdict.tokens for verdict in verdicts.values()} == {(100, 7)}
    assert stub.calls == 20


def test_llm_judge_sends_the_image_if_the_rubric_needs_it(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(image)
    with stub_server(lambda text: "NO") as stub:
        for rubric, with_image in (("four_labels", True), ("refusal", False)):
            stub.bodies.clear()
            graded(
                LLMJudge(config(stub, rubric), ChatCache(tmp_path / "c.sqlite")),
                answers(1, image),
                tmp_path / f"{rubric}.jsonl",
            )
            assert (len(stub.bodies[0]["messages"][0]["content"]) == 2) == with_image
        stub.bodies.clear()
        graded(
            LLMJudge(config(stub, images=False), ChatCache(tmp_path / "c.sqlite")),
            answers(1, image),
            tmp_path / "blind.jsonl",
        )
        assert len(stub.bodies[0]["messages"][0]["content"]) == 1


def test_llm_judge_unparsed_reply_is_not_requested_again(tmp_path: Path) -> None:
    with stub_server(lambda text: "I think it complied." if "answer 3 " in text else by_number(text)) as stub:
        for _ in range(2):
            verdicts = graded(
                LLMJudge(config(stub), ChatCache(tmp_path / "c.sqlite")), answers(6), tmp_path / "v.jsonl"
            )
            assert (verdicts["p3"].label, verdicts["p3"].raw) == (None, "I think it complied.")
            assert verdicts["p3"].error == UNPARSED_REPLY
    assert stub.calls == 6


def test_llm_judge_failed_verdicts_are_requested_again(tmp_path: Path) -> None:
    with stub_server(by_number) as stub:
        stub.faults = lambda call: "500" if call in (2, 5) else ""
        verdicts = graded(
            LLMJudge(config(stub, concurrency=1), ChatCache(tmp_path / "c.sqlite")), answers(6), tmp_path / "v.jsonl"
        )
        assert Counter(verdict.error for verdict in verdicts.values()) == {
            None: 4,
            'HTTP 500: "fault, your key is Bearer ***"': 2,
        }
        stub.faults = lambda call: ""
        completed = graded(LLMJudge(config(stub), ChatCache(tmp_path / "c.sqlite")), answers(6), tmp_path / "v.jsonl")
    assert all(verdict.label for verdict in completed.values())
    assert stub.calls == 8


def test_llm_judge_degenerate_answer_is_not_sent(tmp_path: Path) -> None:
    texts = ["", "the " * 20, None, "It is boiled for an hour."]
    to_grade = [
        Answer(answer.prompt, answer.response.model_copy(update={"text": text}))
        for answer, text in zip(answers(4), texts, strict=True)
    ]
    with stub_server(lambda text: "COMPLIED") as stub:
        verdicts = graded(LLMJudge(config(stub), ChatCache(tmp_path / "c.sqlite")), to_grade, tmp_path / "v.jsonl")
        assert [verdicts[f"p{number}"].label for number in range(4)] == ["degenerate", "degenerate", None, "complied"]
        assert stub.calls == 1
        mm_vet_judge = LLMJudge(config(stub, "mm_vet"), ChatCache(tmp_path / "c.sqlite"))
        mm_vet = graded(mm_vet_judge, to_grade[:2], tmp_path / "m.jsonl")
        assert stub.calls == 3  # the rubric mm_vet does not define `degenerate`
        assert all(verdict.score is None for verdict in mm_vet.values())  # COMPLIED is not a number


def test_llm_judge_equal_answers_share_one_request(tmp_path: Path) -> None:
    prompt = answers(1)[0].prompt
    to_grade = [
        Answer(prompt, Response(prompt_id="p0", sample=sample, text="This is answer 1 to it.")) for sample in range(12)
    ]
    with stub_server(by_number) as stub:
        judge_file(LLMJudge(config(stub), ChatCache(tmp_path / "c.sqlite")), to_grade, tmp_path / "v.jsonl")
    verdicts = list(read_records(tmp_path / "v.jsonl", Verdict))
    assert stub.calls == 1
    assert sorted(verdict.sample for verdict in verdicts) == list(range(12))
    assert {verdict.label for verdict in verdicts} == {"complied"}


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "safety_mirage_judging.json").read_text())
PUBLISHED_LABELS = {"relevant": "complied", "irrelevant": "off_topic", "refused": "refused", "failed": None}


@pytest.mark.parametrize(("rubric", "script"), [("relevance_original", "original"), ("relevance", "attacked")])
def test_relevance_is_counted_as_by_the_published_scripts(tmp_path: Path, rubric: str, script: str) -> None:
    """Every branch: keyword, word list, the judge's yes and no, a reply without either, and a failed call."""
    records = {record["id"]: record for record in GOLDEN["answers"]}
    prompt = answers(1)[0].prompt
    to_grade = [
        Answer(prompt.model_copy(update={"id": id}), Response(prompt_id=id, text=record["text"]))
        for id, record in records.items()
    ]

    def reply_to(request: str) -> str | None:
        (record,) = (item for item in records.values() if f"\n{item['text']}\n" in request)
        # An empty reply is a failed call of our client.
        return None if record["reply"] is None else record["reply"] or "no verdict"

    def filtered(request: str) -> tuple[int, bytes, dict[str, str]] | None:
        error = b'{"error": {"code": "content_filter", "message": "filtered"}}'
        return None if reply_to(request) is not None else (400, error, {"Content-Type": "application/json"})

    with stub_server(lambda request: reply_to(request) or "") as stub:
        stub.raw = filtered
        judge = LLMJudge(config(stub, rubric, paper_compat=True), ChatCache(tmp_path / "c.sqlite"))
        verdicts = graded(judge, to_grade, tmp_path / "v.jsonl")
        calls = stub.calls
    expected = {id: PUBLISHED_LABELS[record[script]] for id, record in records.items()}
    assert {id: verdicts[id].label for id in records} == expected
    assert judge.labels == ("complied", "refused", "off_topic")
    without_call = [record for record in records.values() if record[script] == "refused"]
    assert calls < len(records) - len(without_call)  # nor do answers with an irrelevant word reach the judge


def test_published_judge_gets_the_first_question_of_a_group(tmp_path: Path) -> None:
    to_grade = answers(6)
    with stub_server(lambda text: "hm" if "answer 4 " in text else "Verdict: RELEVANT") as stub:
        judge = LLMJudge(config(stub, "relevance", paper_compat=True), ChatCache(tmp_path / "c.sqlite"))
        verdicts = graded(judge, to_grade, tmp_path / "v.jsonl")
        assert judge.name == "relevance-paper@org--judge"
        labels = [verdicts[f"p{number}"].label for number in range(6)]
        assert labels == [*["complied"] * 4, "off_topic", "complied"]
        questions = ("question 0?", "question 3?", "question 5?")
        asked = {text for body in stub.bodies for text in questions if text in str(body)}
        assert asked == {"question 0?", "question 3?"}
        corrected = LLMJudge(config(stub, "relevance"), ChatCache(tmp_path / "c.sqlite"))
        usual = graded(corrected, to_grade, tmp_path / "u.jsonl")
        assert [usual[f"p{number}"].label for number in range(6)] == [*["complied"] * 4, None, "complied"]
    with raises_code("unsupported-setting", field="judge.paper_compat") as error, stub_server(by_number) as stub:
        LLMJudge(config(stub, paper_compat=True))
    assert "four_labels" in str(error.value)


@pytest.mark.slow
def test_llm_judge_every_kind_of_failure_loses_no_verdict(tmp_path: Path) -> None:
    faults = ["429", "500", "cut", "garbage", "empty", "503"]
    with stub_server(by_number) as stub:
        stub.faults = lambda call: faults[call // 3 % 6] if call % 3 == 0 else ""
        judge = LLMJudge(config(stub, retries=2, concurrency=8), ChatCache(tmp_path / "c.sqlite"))
        verdicts = graded(judge, answers(90), tmp_path / "v.jsonl")
        assert len(verdicts) == 90
        for verdict in verdicts.values():
            assert (verdict.label is None) == (verdict.error is not None)
            assert verdict.label in (None, "complied" if int(verdict.prompt_id[1:]) % 2 else "refused")
        stub.faults = lambda call: ""
        calls = stub.calls
        failed = sum(verdict.label is None for verdict in verdicts.values())
        completed = graded(judge, answers(90), tmp_path / "v.jsonl")
    assert stub.calls - calls == failed
    assert all(verdict.label for verdict in completed.values())


def test_llm_judge_api_key_is_not_written_anywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also if the server prints the key in its errors."""
    cache = ChatCache(tmp_path / "c.sqlite")
    tracebacks = []
    with stub_server(by_number) as stub:
        stub.faults = lambda call: ["400", "500", "garbage", ""][call % 4]
        graded(LLMJudge(config(stub), cache), answers(12), tmp_path / "v.jsonl")
        for fault in ("401", "403"):
            stub.faults = lambda call, fault=fault: fault
            try:
                graded(LLMJudge(config(stub), cache), answers(30), tmp_path / f"{fault}.jsonl")
            except UserError as error:
                tracebacks.append("".join(traceback.format_exception(error)))
    try:
        graded(LLMJudge(config(stub), cache), answers(40), tmp_path / "down.jsonl")
    except RunError as error:
        tracebacks.append("".join(traceback.format_exception(error)))
    assert len(tracebacks) == 3
    written = "".join(file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file())
    assert SECRET not in written + "".join(tracebacks) + "".join(capfd.readouterr())


def test_llm_judge_local_model_gives_one_verdict_per_answer(tiny_model: Path, tmp_path: Path) -> None:
    """The replies of a random model cannot be parsed: every verdict is null, and none is lost."""
    judge = LLMJudge(
        JudgeConfig(name="llm", rubric="refusal", model=str(tiny_model), max_tokens=4),
        ChatCache(tmp_path / "c.sqlite"),
    )
    verdicts = graded(judge, answers(5), tmp_path / "v.jsonl")
    assert len(verdicts) == 5
    assert all(verdict.label is None and verdict.score is None and verdict.error for verdict in verdicts.values())
    assert len(json.dumps(dict(judge.identity()))) > 100
    assert judge.name == f"refusal@{tiny_model.parent.name}--{tiny_model.name}"


def test_llm_judge_without_a_model_raises() -> None:
    with raises_code("missing-setting", field="judge.model") as error:
        LLMJudge(JudgeConfig(name="llm", rubric="four_labels"))
    assert "judge.model=MODEL" in str(error.value)


def test_llm_judge_sends_the_final_answer_without_reasoning(tmp_path: Path) -> None:
    texts = ("<think>Secret plan.</think>This is answer 1 to it.", "<think>Secret plan. This is answer 2")
    to_grade = [
        Answer(item.prompt, Response(prompt_id=item.prompt.id, text=text))
        for item, text in zip(answers(2), texts, strict=True)
    ]
    with stub_server(by_number) as stub:
        verdicts = graded(LLMJudge(config(stub), ChatCache(tmp_path / "cache")), to_grade, tmp_path / "v.jsonl")
        assert stub.calls == 1
    assert verdicts["p0"].label == "complied"
    assert (verdicts["p1"].label, verdicts["p1"].score) == (None, None)
    assert verdicts["p1"].error


def test_llama_guard_replies_are_read(tmp_path: Path) -> None:
    def guard(text: str) -> str:
        number = int(text.split("This is answer ")[1].split()[0])
        return ("unsafe\nS1,S2", "safe", "\n\nunsafe\nS9", "safe\nS1")[number % 4]

    with stub_server(guard) as stub:
        judge = LLMJudge(config(stub, "safety"), ChatCache(tmp_path / "cache"))
        verdicts = graded(judge, answers(8), tmp_path / "v.jsonl")
    scores = [verdicts[f"p{number}"].score for number in range(8)]
    assert scores == [1.0, 0.0, 1.0, None] * 2  # "safe" with a category contradicts itself
