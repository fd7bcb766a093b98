"""Functions as judges: grades, failures, arguments and identities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import raises_code
from vlm_unlearn.data.images import image_reference
from vlm_unlearn.judging import FunctionJudge, Judgment, judge
from vlm_unlearn.judging.base import Answer, OfflineJudge
from vlm_unlearn.records import Prompt, Response, Verdict

PROMPT = Prompt(id="p", group_id="p", set="s", kind="unsafe", question="How?", reference="so", category="tools")


def answer(text: str | None, **fields: Any) -> Answer:
    response = Response(prompt_id="p", sample=2, text=text, error=None if text is not None else "out of memory")
    return Answer(PROMPT, response, **fields)


def verdict_of(value: Any, **options: Any) -> Verdict:
    """The verdict of a judge that returns a value for every answer."""
    return judge(**{"labels": ("complied", "refused"), **options})(lambda question, answer: value).verdict(
        answer("Ok.")
    )


def test_judge_grades_with_labels() -> None:
    @judge(labels=("complied", "refused"))
    def by_phrase(question: str, answer: str, image: object = None, reference: str | None = None) -> str:
        assert (question, image, reference) == ("How?", None, "so")
        return "refused" if "sorry" in answer.lower() else "complied"

    assert (by_phrase.name, by_phrase.labels) == ("by_phrase", ("complied", "refused", "degenerate"))
    verdict = by_phrase.verdict(answer("Sorry."))
    assert (verdict.key, verdict.judge, verdict.label, verdict.error) == (("p", 2), "by_phrase", "refused", None)
    assert by_phrase.verdict(answer("First open it.")).label == "complied"
    assert by_phrase("How?", "Sorry.", None, "so") == "refused"  # still a function


@pytest.mark.parametrize("text", ["", " \n", "no no no no no no no no no no", "..."])
def test_empty_and_degenerate_answers_never_reach_the_function(text: str) -> None:
    def fails(question: str, answer: str) -> str:
        raise AssertionError

    assert FunctionJudge(fails, ("refused",)).verdict(answer(text)).label == "degenerate"
    verdict = FunctionJudge(fails, scores=True).verdict(answer(text))
    assert (verdict.label, verdict.score) == (None, None)
    assert verdict.error


def test_degenerate_answers_can_be_left_to_the_function_but_not_empty_ones() -> None:
    lenient = FunctionJudge(lambda question, answer: "refused", ("refused",), detect_degenerate=False)
    assert lenient.verdict(answer("no " * 20)).label == "refused"
    assert lenient.verdict(answer("  ")).label == "degenerate"


def test_failed_answer_is_a_failed_verdict() -> None:
    verdict = FunctionJudge(lambda question, answer: "refused", ("refused",)).verdict(answer(None))
    assert (verdict.label, verdict.error) == (None, "out of memory")


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


@pytest.mark.parametrize(
    "value",
    [
        *("harmless", "REFUSED", "off_topic", "", 0.5, True, None, [], {}, object(), Unprintable(), b"refused"),
        *({"label": "refused", "grade": 1}, {"label": 3}, {"score": 0.1}, Judgment(explanation="Why.")),
        {"label": Unprintable()},
    ],
    ids=lambda value: type(value).__name__,
)
def test_invalid_grades_are_failed_verdicts(value: Any) -> None:
    verdict = verdict_of(value)
    assert (verdict.label, verdict.score) == (None, None)
    assert verdict.error


@pytest.mark.parametrize("value", [1.01, -0.1, float("nan"), float("inf"), "0.5", 10**400, True, np.bool_(True)])
def test_invalid_scores_are_failed_verdicts(value: Any) -> None:
    verdict = verdict_of(value, labels=(), scores=True)
    assert (verdict.label, verdict.score) == (None, None)
    assert verdict.error


@pytest.mark.parametrize("value", [0, 1, 0.25, np.float32(0.25), np.array(0.25), {"score": 0.25}])
def test_scores(value: Any) -> None:
    assert verdict_of(value, labels=(), scores=True).score == float(
        value["score"] if isinstance(value, dict) else value
    )


def test_dicts_and_judgments_carry_explanations() -> None:
    for value in (
        Judgment("refused", 0.0, "It says no."),
        {"label": "refused", "score": 0, "explanation": "It says no."},
    ):
        verdict = verdict_of(value, scores=True)
        assert (verdict.label, verdict.score, verdict.raw) == ("refused", 0.0, "It says no.")


def test_errors_of_the_function_are_failed_verdicts() -> None:
    @judge(labels=("refused",))
    def broken(question: str, answer: str) -> str:
        raise ValueError("\x1b[31mno\nno")

    verdict = broken.verdict(answer("Ok."))
    assert verdict.label is None
    assert verdict.raw is None  # so that a resumed evaluation tries it again
    assert verdict.error == "ValueError: \\x1b[31mno\\nno"


def test_function_gets_the_image_only_if_it_takes_one(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 3), (9, 8, 7, 255))
    picture.save(tmp_path / "a.png")
    pictures = []

    @judge(labels=("refused",))
    def look(answer: str, *, image: Image.Image) -> str:
        pictures.append((image.mode, image.size, image.getpixel((0, 0))))
        return "refused"

    prompt = PROMPT.model_copy(update={"image": "a.png"})
    response = Response(prompt_id="p", text="No.")
    for item in (
        Answer(prompt, response, tmp_path),
        Answer(prompt, response, image_reference=image_reference(picture)),
    ):
        assert look.verdict(item).label == "refused"
    assert pictures == [("RGB", (4, 3), (9, 8, 7))] * 2
    (tmp_path / "a.png").write_bytes(b"no image")
    assert look.verdict(Answer(prompt, response, tmp_path)).error
    blind = judge(labels=("refused",))(lambda question, answer: "refused")
    assert blind.verdict(Answer(prompt, response, tmp_path)).label == "refused"


def test_arguments_by_name_and_by_position() -> None:
    labels = {"labels": ("refused", "complied")}
    for function in (
        lambda q, a: "refused" if a == "Ok." else "complied",
        lambda answer: "refused" if answer == "Ok." else "complied",
        lambda **values: "refused" if values["answer"] == "Ok." and values["kind"] == "unsafe" else "complied",
        lambda question, answer, prompt, temperature=0: "refused" if prompt.category == "tools" else "complied",
    ):
        assert judge(**labels)(function).verdict(answer("Ok.")).label == "refused"

    class Phrases:
        def __call__(self, question: str, answer: str) -> str:
            return "refused"

    assert judge(**labels)(Phrases()).name == "Phrases"
    with raises_code("invalid-judge", field="temperature"):
        judge(**labels)(lambda question, answer, temperature: "refused")
    with raises_code("invalid-judge"):
        judge(**labels)(lambda: "refused")
    with raises_code("invalid-judge"):
        judge(**labels)("keyword")  # type: ignore[arg-type]

    async def later(question: str, answer: str) -> str:
        return "refused"

    with raises_code("invalid-judge"):
        judge(**labels)(later)


def test_labels_must_be_known() -> None:
    with raises_code("unknown-name", field="labels"):
        judge(labels=("complied", "harmless"))(lambda question, answer: None)
    with raises_code("missing-setting", field="labels"):
        judge()(lambda question, answer: None)


def test_decorator_without_parentheses_allows_labels_and_scores() -> None:
    @judge
    def free(question: str, answer: str) -> float | str:
        return 0.5 if answer == "Half." else "off_topic"

    assert free.verdict(answer("Half.")).score == 0.5
    assert free.verdict(answer("Other.")).label == "off_topic"


def define(source: str) -> Any:
    names: dict[str, Any] = {}
    exec(source, names)
    return names["f"]


def test_identity_depends_on_the_source() -> None:
    first = judge(labels=("refused",), name="f")(lambda question, answer: "refused")
    second = judge(labels=("refused",), name="f")(lambda question, answer: None)
    assert first.identity() == first.identity()
    assert first.identity() != second.identity()
    without_source = "def f(question, answer):\n    return 'refused'\n"
    third, fourth = (judge(labels=("refused",))(define(without_source)) for _ in range(2))
    assert third.identity() == third.identity()
    assert third.identity() != fourth.identity()  # nothing shows that they are equal
    versions = [judge(labels=("refused",), version="1")(define(without_source)).identity() for _ in range(2)]
    assert versions[0] == versions[1]


def test_identity_of_a_class_without_a_file() -> None:
    namespace: dict[str, Any] = {"OfflineJudge": OfflineJudge, "Verdict": Verdict, "__name__": "__notebook__"}
    exec(
        "class Mine(OfflineJudge):\n    name, labels = 'mine', ('refused',)\n"
        "    def grade(self, prompt, text):\n"
        "        return Verdict(prompt_id=prompt.id, judge='mine', label='refused')\n",
        namespace,
    )
    assert namespace["Mine"]().identity()["judge"] == "mine"


def test_names_are_safe_file_names() -> None:
    assert FunctionJudge(lambda question, answer: None, ("refused",), name="../my judge").name == "my_judge"
