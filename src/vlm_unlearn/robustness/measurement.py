"""Measures one attack on one model: asks, grades, and writes the answers of every state into one file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.core import generate_missing, pair_answers
from vlm_unlearn.generation.hf import ModelBackend
from vlm_unlearn.judging.base import Answer, Judge, grade_missing
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.robustness.base import AttackedState, AttackTarget, ModelAttack
from vlm_unlearn.robustness.results import AttackedAnswer, MeasuredState, UngradedAnswer
from vlm_unlearn.store import RecordList, digest_file, digest_json, read_json, write_json

OnState = Callable[[str], None]  # called with the name of each measured state


@dataclass(frozen=True)
class MeasurementFile:
    """The file with the answers of one model under one attack. It is written at once, so that it is complete.

    Args:
        folder: The folder of all measurements.
        attack: The attack's name.
        identity: Everything that determines the answers. Its digest is part of the file's name.
    """

    folder: Path
    attack: str
    identity: dict[str, object]

    @property
    def path(self) -> Path:
        """The path of the file."""
        name = "".join(char if char.isalnum() or char in "-_" else "_" for char in self.attack)[:60]
        return self.folder / f"{name}-{digest_json(self.identity)[:20]}.json"

    def read(self) -> list[MeasuredState] | None:
        """Returns the states, or None if the file does not exist.

        Raises:
            UserError: The file is broken.
        """
        if not self.path.is_file():
            return None
        try:
            return [MeasuredState.model_validate(state) for state in read_json(self.path)["states"]]
        except (ValidationError, KeyError, TypeError):
            raise UserError(
                "is not a measurement of this version. Delete it, and run the command again.",
                code="invalid-measurement",
                file=self.path,
            ) from None

    def write(self, states: list[MeasuredState]) -> None:
        """Writes the states."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"schema": 1, "identity": self.identity, "states": [state.model_dump() for state in states]}
        write_json(self.path, content)


def attack_code(attack: ModelAttack) -> str:
    """Returns the digest of the file that defines an attack, so that results of changed code are not reused."""
    return digest_file(Path(inspect.getfile(type(getattr(attack, "attack", attack)))))


def measure(
    attack: ModelAttack, target: AttackTarget, judge: Judge, on_state: OnState | None = None
) -> Iterator[MeasuredState]:
    """Attacks a model, and yields every state with the graded answers.

    Args:
        attack: The attack.
        target: The model.
        judge: The judge of the answers.
        on_state: Called with the name of each state before its questions are asked.
    """
    with torch.random.fork_rng(), closing(attack.run(target)) as states:  # type: ignore[type-var]
        torch.manual_seed(target.seed)
        for state in states:
            if on_state:
                on_state(state.name)
            yield _measure_state(state, target, judge)


def _measure_state(state: AttackedState, target: AttackTarget, judge: Judge) -> MeasuredState:
    requests = [
        request
        for request in (target.questions if state.requests is None else state.requests)
        if state.group_ids is None or request.prompt.group_id in state.group_ids
    ]
    ungraded: list[UngradedAnswer] = []
    if state.scores is not None:
        answers = [
            AttackedAnswer(
                prompt_id=request.prompt.id,
                group_id=request.prompt.group_id,
                score=state.scores.get(request.prompt.id),
                error=None if request.prompt.id in state.scores else "no score",
            )
            for request in requests
        ]
    else:
        responses = RecordList[Response]()
        generate_missing(ModelBackend(target.vlm.model, target.vlm.processor, target.generation), requests, responses)
        prompts = {request.prompt.id: request.prompt for request in requests}
        answers, ungraded = _grade(judge, pair_answers(prompts, responses.records, _answer_of(target.image_roots)))
    return MeasuredState(
        name=state.name,
        curve=state.curve,
        step=state.step,
        is_score=state.scores is not None,
        facts=dict(state.facts),
        answers=answers,
        ungraded=ungraded,
    )


def grade_again(
    states: Sequence[MeasuredState], judge: Judge, image_roots: Mapping[str, Path]
) -> list[MeasuredState] | None:
    """Grades the answers whose verdict failed again, without generating them again.

    Args:
        states: The states of a measurement.
        judge: The judge that graded them.
        image_roots: The folder of the images of each split.

    Returns:
        The states with the new verdicts, or None if no verdict had failed.
    """
    if not any(state.ungraded for state in states):
        return None
    answer_of = _answer_of(image_roots)
    graded = []
    for state in states:
        pending = [answer_of(item.prompt, item.response, item.first_question) for item in state.ungraded]
        answers, ungraded = _grade(judge, pending)
        verdicts = {(answer.prompt_id, answer.sample): answer for answer in answers}
        merged = [verdicts.get((answer.prompt_id, answer.sample), answer) for answer in state.answers]
        graded.append(state.model_copy(update={"answers": merged, "ungraded": ungraded}))
    return graded


def _answer_of(image_roots: Mapping[str, Path]) -> Callable[[Prompt, Response, str | None], Answer]:
    return lambda prompt, response, first: Answer(prompt, response, image_roots[prompt.set], first)


def _grade(judge: Judge, pending: Sequence[Answer]) -> tuple[list[AttackedAnswer], list[UngradedAnswer]]:
    """Returns the graded answers, and those among them whose verdict failed although there is an answer."""
    verdicts = RecordList[Verdict]()
    grade_missing(judge, pending, verdicts)
    by_key = {verdict.key: verdict for verdict in verdicts.records}
    answers, ungraded = [], []
    for item in sorted(pending, key=lambda answer: answer.response.key):
        response, verdict = item.response, by_key[item.response.key]
        answers.append(
            AttackedAnswer(
                prompt_id=response.prompt_id,
                group_id=item.prompt.group_id,
                sample=response.sample,
                text=response.text,
                label=verdict.label,
                score=verdict.score,
                error=verdict.error or response.error,
            )
        )
        if verdict.error is not None and response.error is None:
            ungraded.append(UngradedAnswer(prompt=item.prompt, response=response, first_question=item.first_question))
    return answers, ungraded
