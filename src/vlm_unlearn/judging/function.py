"""Judges that are Python functions."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from vlm_unlearn.config import JudgeConfig
from vlm_unlearn.data.images import open_image
from vlm_unlearn.errors import UserError, nearest, printable, quoted
from vlm_unlearn.judging import degenerate
from vlm_unlearn.judging.base import Answer, OfflineJudge, register
from vlm_unlearn.judging.degenerate import degenerate_reason
from vlm_unlearn.metrics import answer_reading
from vlm_unlearn.metrics.answer_reading import UNFINISHED_REASONING, final_answer
from vlm_unlearn.plugins import code_digest
from vlm_unlearn.records import LABELS, Label, Prompt, Response, Verdict
from vlm_unlearn.store import digest_file

# The arguments that a function can take, by name.
ARGUMENTS = ("question", "answer", "image", "reference", "category", "kind", "prompt")


@dataclass(frozen=True)
class Judgment:
    """A grade with an explanation, for a judge function to return.

    Attributes:
        label: One of the judge's labels.
        score: A number from 0 to 1.
        explanation: The reason. It is saved with the verdict.
    """

    label: Label | None = None
    score: float | None = None
    explanation: str | None = None


@register("function")
class FunctionJudge(OfflineJudge):
    """A judge that calls a function for each answer. The decorator `judge` makes one.

    A failed answer gets a failed verdict. An empty answer, and an answer without meaning such as one repeated word, is
    labeled ``degenerate``. If the judge returns scores only, it gets a failed verdict. The function is not called for
    these answers.

    Args:
        function: The function.
        labels: The labels that the function can return. ``degenerate`` is added if there are any.
        scores: Whether the function can return scores.
        name: The name of the judge. By default, the name of the function.
        version: A version of the judge, in place of the digest of the function's source.
        detect_degenerate: Whether the judge looks for answers without meaning itself. Empty answers never reach the
            function.

    Raises:
        UserError: A label is unknown, neither labels nor scores are allowed, the function is asynchronous, or it
            requires an argument that judges do not pass.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        labels: Sequence[str] = (),
        scores: bool = False,
        name: str | None = None,
        version: str | None = None,
        detect_degenerate: bool = True,
    ) -> None:
        if not callable(function):
            raise UserError(
                f"a judge must be a function, not {quoted(type(function).__name__)}.",
                code="invalid-judge",
                field="judge",
            )
        default_name = getattr(function, "__name__", type(function).__name__)
        self.name = re.sub(r"[^A-Za-z0-9._-]", "_", name or default_name).strip("._-")[:60] or "judge"
        self.labels = _checked_labels(labels, scores, self.name)
        self.scores = scores
        self._function = function
        self._detect_degenerate = detect_degenerate
        self._arguments = _argument_names(function, self.name)
        is_plain = inspect.isfunction(function) or inspect.ismethod(function)
        self._code = code_digest(function if is_plain else type(function)) if version is None else None
        self._version = version

    @classmethod
    def from_config(cls, config: JudgeConfig) -> FunctionJudge:
        """Raises an error: a suite contains the name of a function that `evaluate` got, and not the function.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"the judge {config.function} is a Python function. Grade with it by vlm_unlearn.evaluation.evaluate, or "
            "pass another judge, such as judge=keyword.",
            code="unsupported-setting",
            field="judge.name",
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"FunctionJudge({self.name!r}, labels={self.labels!r}, scores={self.scores!r})"

    def identity(self) -> Mapping[str, object]:
        """Returns the name, and the version or a digest of the function's source.

        The digest does not cover other functions, global variables and closures that the function uses. Pass `version`
        and change it together with them. Without a version and without a source (a function that ``exec`` has defined),
        the identity differs from that of every other judge, so that no verdict is reused.
        """
        return {
            "judge": self.name,
            "code": self._code,
            "version": self._version,
            "scores": self.scores,
            "detect_degenerate": self._detect_degenerate,
            "degenerate": digest_file(Path(degenerate.__file__)),
            "reading": digest_file(Path(answer_reading.__file__)),
        }

    def grade(self, prompt: Prompt, text: str) -> Verdict:
        """Returns the verdict on a text, for a function that needs no image."""
        return self.verdict(Answer(prompt, Response(prompt_id=prompt.id, text=text)))

    def verdict(self, answer: Answer) -> Verdict:
        """Returns the verdict on one response. An error of the function becomes a failed verdict with the reason."""
        text = answer.response.text
        if text is None:
            return self.failed_verdict(answer, answer.response.error or "no answer")
        text = final_answer(text)
        if text is None:
            return self.failed_verdict(answer, UNFINISHED_REASONING)
        reason = degenerate_reason(text) if self._detect_degenerate else None if text.strip() else "empty"
        if reason is not None:
            if not self.labels:
                return self.failed_verdict(answer, f"the answer is degenerate: {reason}", raw=reason)
            return self._checked_verdict(answer, Judgment("degenerate", None, reason))
        try:
            result = self._call(answer, text)
        except Exception as error:
            return self.failed_verdict(answer, _describe(error))
        try:
            return self._checked_verdict(answer, _judgment(result))
        except ValueError as problem:
            return self.failed_verdict(answer, str(problem), raw=_shortened(result))

    def _call(self, answer: Answer, text: str) -> Any:
        prompt = answer.prompt
        if self._arguments is None:
            return self._function(prompt.judged_question or prompt.question, text)
        image = answer.image() if "image" in self._arguments else None
        values = {
            "question": prompt.judged_question or prompt.question,
            "answer": text,
            "image": None if image is None else open_image(image),
            "reference": prompt.reference,
            "category": prompt.category,
            "kind": prompt.kind,
            "prompt": prompt,
        }
        return self._function(**{name: values[name] for name in self._arguments})

    def _checked_verdict(self, answer: Answer, judgment: Judgment) -> Verdict:
        """Returns a judgment as a verdict.

        Raises:
            ValueError: The judgment has a label or score that the judge must not return, or none.
        """
        label, score = judgment.label, judgment.score
        if label is None and score is None:
            raise ValueError("the judge could not grade the answer")
        if label is not None and label not in self.labels:
            allowed = ", ".join(self.labels) or "none"
            raise ValueError(f"the judge returned the label {quoted(label)}. Its labels are: {allowed}.")
        if score is not None and not self.scores:
            raise ValueError("the judge returned a score, but it is declared without scores=True")
        if score is None and not self.labels:
            raise ValueError("the judge returned no score")
        if label is None and not self.scores:
            raise ValueError("the judge returned no label")
        return Verdict(
            prompt_id=answer.response.prompt_id,
            sample=answer.response.sample,
            judge=self.name,
            label=label,
            score=score,
            raw=judgment.explanation,
        )


@overload
def judge(function: Callable[..., Any], /) -> FunctionJudge: ...


@overload
def judge(
    *,
    labels: Sequence[str] = (),
    scores: bool = False,
    name: str | None = None,
    version: str | None = None,
    detect_degenerate: bool = True,
) -> Callable[[Callable[..., Any]], FunctionJudge]: ...


def judge(
    function: Callable[..., Any] | None = None,
    /,
    *,
    labels: Sequence[str] = (),
    scores: bool = False,
    name: str | None = None,
    version: str | None = None,
    detect_degenerate: bool = True,
) -> FunctionJudge | Callable[[Callable[..., Any]], FunctionJudge]:
    """Makes a judge of a function.

    The function is called once for each answer. Of the arguments `question`, `answer`, `image`, `reference`,
    `category`, `kind` and `prompt` it gets those that it has parameters for. `image` is an RGB image of Pillow or None,
    and `prompt` the complete `Prompt`.

    The function returns one of the following:

    - a label, such as ``"refused"``
    - a score from 0 to 1, with ``scores=True``
    - a `Judgment` or a dict with `label`, `score` and `explanation`
    - None if it cannot grade the answer

    None, an error, an unknown label and a score outside of 0 to 1 are failed verdicts. They are counted, and never
    count as safe. `FunctionJudge` describes empty and degenerate answers.

    Args:
        function: The function, if the decorator is used without parentheses. It may then return every label or a score.
        labels: The labels that the function can return, out of ``complied``, ``refused``, ``degenerate`` and
            ``off_topic``.
        scores: Whether the function can return scores.
        name: The name of the judge. By default, the name of the function.
        version: A version of the judge, in place of the digest of the function's source. Change it with the functions
            and variables that the function uses.
        detect_degenerate: Whether an answer without meaning, such as one repeated word, is labeled ``degenerate``
            without calling the function. Empty answers always are.

    Returns:
        The judge, which can still be called as the function.

    Raises:
        UserError: A label is unknown, or the function requires an argument that judges do not pass.

    Example:
        ::

            @judge(labels=("complied", "refused"))
            def by_phrase(question, answer, image=None, reference=None):
                return "refused" if "sorry" in answer.lower() else "complied"
    """
    if function is not None:
        return FunctionJudge(function, LABELS, scores=True)
    return lambda wrapped: FunctionJudge(wrapped, labels, scores, name, version, detect_degenerate)


def _checked_labels(labels: Sequence[str], scores: bool, name: str) -> tuple[Label, ...]:
    if isinstance(labels, str):
        labels = (labels,)
    for label in labels:
        if label not in LABELS:
            raise UserError(
                f"the judge {name} has the unknown label {quoted(label)}{nearest(str(label), LABELS)}. "
                f"Labels are {', '.join(LABELS)}.",
                code="unknown-name",
                field="labels",
            )
    if not labels and not scores:
        raise UserError(
            f"the judge {name} needs `labels`, such as complied and refused, or scores=True.",
            code="missing-setting",
            field="labels",
        )
    return tuple(label for label in LABELS if label in labels or (labels and label == "degenerate"))


def _argument_names(function: Callable[..., Any], name: str) -> tuple[str, ...] | None:
    """Returns the arguments to pass by name. None for a function of `q` and `a`, which gets them by position."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        raise UserError(f"the judge {name} is asynchronous. Make it a plain function.", code="invalid-judge")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions of C have no signature
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return ARGUMENTS
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in variadic]
    by_name = [p.name for p in parameters if p.name in ARGUMENTS and p.kind is not p.POSITIONAL_ONLY]
    if all(parameter.name in by_name for parameter in required) and by_name:
        return tuple(by_name)
    if [p.name for p in required] == ["q", "a"] and all(p.kind is not p.KEYWORD_ONLY for p in required):
        return None
    unknown = [parameter.name for parameter in required if parameter.name not in by_name]
    raise UserError(
        f"the judge {name} requires arguments that judges do not pass: {', '.join(unknown) or 'none are required'}. "
        f"Use some of {', '.join(ARGUMENTS)}.",
        code="invalid-judge",
        field=unknown[0] if unknown else None,
    )


def _judgment(result: Any) -> Judgment:
    """Returns the value that a function returned as a judgment.

    Raises:
        ValueError: The value is neither a label, a score, a judgment nor None.
    """
    if result is None:
        return Judgment()
    if isinstance(result, str):
        return Judgment(label=str(result))  # type: ignore[arg-type]  # the label is checked later
    if isinstance(result, Judgment):
        fields: Mapping[Any, Any] = vars(result)
    elif isinstance(result, Mapping):
        fields = result
    else:
        return Judgment(score=_score(result))
    unknown = [str(key) for key in fields if key not in ("label", "score", "explanation")]
    if unknown:
        raise ValueError(f"the judge returned the unknown key {quoted(unknown[0])}. Use label, score or explanation.")
    label, score, explanation = (fields.get(key) for key in ("label", "score", "explanation"))
    if label is not None and not isinstance(label, str):
        raise ValueError(f"the judge returned a label of the type {type(label).__name__}")
    return Judgment(
        label=label,  # type: ignore[arg-type]  # checked later
        score=None if score is None else _score(score),
        explanation=None if explanation is None else _shortened(explanation, 20_000),
    )


def _score(value: Any) -> float:
    if isinstance(value, bool) or type(value).__name__ == "bool":  # NumPy's too
        raise ValueError(f"the judge returned {value}. Return a label or a score.")
    try:
        number = float(value)
    except Exception:
        raise ValueError(f"the judge returned a {type(value).__name__}. Return a label, a score or a dict.") from None
    if not math.isfinite(number) or not 0 <= number <= 1:
        raise ValueError(f"the judge returned the score {number:g}. Scores are from 0 to 1.")
    return number


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(_shortened(error, 300))}"


def _shortened(value: object, length: int = 300) -> str:
    try:
        return str(value)[:length]
    except Exception:  # of the value's own __str__
        return f"<{type(value).__name__}>"
