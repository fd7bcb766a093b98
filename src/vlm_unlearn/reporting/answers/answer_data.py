"""Reads all questions, answers and verdicts of several runs, and puts what belongs to one question together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm_unlearn.benchmarks import NoAnswersError
from vlm_unlearn.config import BenchmarkConfig, Suite
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.answers import RESPONSES
from vlm_unlearn.evaluation.benchmarks import benchmark_outcomes
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.prompts import image_roots
from vlm_unlearn.generation.base import ResponseKey
from vlm_unlearn.records import LABELS, Prompt, Response, Verdict
from vlm_unlearn.reporting.answers.thumbnails import Picture, Source
from vlm_unlearn.store import read_json, read_records


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    model: str
    prompts: Mapping[str, Prompt]
    responses: list[Response]
    verdicts: Mapping[str, Mapping[ResponseKey, Verdict]]  # judge -> verdict of each answer that it graded
    judges: Mapping[str, str]  # case or benchmark -> the judge that its rates are made of
    roots: Mapping[str, Path]  # case or benchmark -> where its images are
    tells: Mapping[str, Collection[str]]  # judge -> the labels that it can give

    def image(self, prompt: Prompt) -> Source | None:
        return None if prompt.image is None else (self.roots.get(prompt.set), prompt.image)


@dataclass(frozen=True)
class Answer:
    """A model's answer with all verdicts on it."""

    model: str
    response: Response
    judge: str  # the one that its model's rates are made of
    verdicts: Mapping[str, Verdict]


@dataclass(frozen=True)
class Question:
    """A prompt with the answers of all models that were asked it."""

    prompt: Prompt
    picture: Picture  # without file and problem where the question has no image
    answers: list[Answer] = field(default_factory=list)


def read_run(model: str, folder: Path) -> tuple[Run, list[str]]:
    """A run with the verdicts of every judge that graded it, and what could not be read of it, in words.

    Raises:
        UserError: the folder is no evaluation, or a file of it other than verdicts is broken.
    """
    suite = saved_suite(folder)
    prompts = {prompt.id: prompt for prompt in read_records(folder / "prompts.jsonl", Prompt)}
    responses = [response for response in read_records(folder / RESPONSES, Response) if response.prompt_id in prompts]
    verdicts: dict[str, Mapping[ResponseKey, Verdict]] = {}
    notes = []
    for file in sorted(folder.glob("verdicts-*.jsonl")):
        read, broken = _as_far_as_it_goes(file)
        verdicts[judge := file.stem.removeprefix("verdicts-")] = read
        if broken is not None:
            notes.append(
                f"{model}: of the judge {judge} {len(read):,} verdicts are shown; the rest of its file can't be read: {broken}"
            )
    judges = {case.name: suite.judge.judge_id for case in suite.splits}
    for benchmark in suite.benchmarks:
        if benchmark.judge:
            judges[benchmark.name] = suite.judge_config(benchmark.judge).judge_id
            continue
        judges[benchmark.name] = own = f"{benchmark.name}'s own scores"
        try:
            verdicts[own] = _official(benchmark, own, prompts, responses)
        except NoAnswersError:
            continue
        except UserError as error:
            notes.append(f"{model}: answers to {benchmark.name} stand without their scores: {error}")
    tells = {judge: _labels(folder / f"judge-{judge}.json") for judge in verdicts}
    return Run(model, prompts, responses, verdicts, judges, _roots(suite), tells), notes


def _as_far_as_it_goes(file: Path) -> tuple[dict[ResponseKey, Verdict], UserError | None]:
    """A judge's verdicts up to the first broken line, such as a kill leaves, and what is wrong with that."""
    found: dict[ResponseKey, Verdict] = {}
    try:
        for verdict in read_records(file, Verdict):
            found[verdict.key] = verdict
    except UserError as error:
        return found, error
    return found, None


def _labels(note: Path) -> Collection[str]:
    """The labels that a judge can give, as its note says; all where there is none."""
    identity = read_json(note) if note.is_file() else None
    told = identity.get("labels") if isinstance(identity, dict) else None
    return [label for label in LABELS if label in told] if isinstance(told, list) else LABELS


def _official(
    config: BenchmarkConfig, judge: str, prompts: Mapping[str, Prompt], responses: Iterable[Response]
) -> dict[ResponseKey, Verdict]:
    """A benchmark's own score of each answer, as verdicts."""
    scores = benchmark_outcomes(config, prompts, responses, {}).values
    given = ((f"{config.name}/{id}", value) for id, value in scores.items())
    return {
        (id, 0): Verdict(prompt_id=id, judge=judge, score=min(1.0, max(0.0, value)))
        for id, value in given
        if id in prompts
    }


def _roots(suite: Suite) -> dict[str, Path]:
    try:
        return image_roots(suite)
    except UserError:  # a benchmark that this version doesn't know
        return {case.name: case.images for case in suite.splits}


def join_questions(runs: Sequence[Run], pictures: Mapping[Source, Picture]) -> list[Question]:
    """All questions in the order they were asked, each with the answers of every run, in the order of `runs` and of the samples.

    Runs share a question where the whole prompt is the same, and so is the image; where only one of them has the image, it is shown.
    """
    seen: dict[Prompt, dict[str, Picture]] = {}
    for run in runs:
        for prompt in run.prompts.values():
            picture = _picture(run, prompt, pictures)
            seen.setdefault(prompt, {}).setdefault(picture.file, picture)
    joined: dict[tuple[Prompt, str], Question] = {}
    for run in runs:
        own: dict[str, Question] = {}
        for prompt in run.prompts.values():
            files = [file for file in seen[prompt] if file]
            file = _picture(run, prompt, pictures).file if len(files) > 1 else "".join(files)
            own[prompt.id] = joined.setdefault((prompt, file), Question(prompt, seen[prompt][file]))
        for response in sorted(run.responses, key=lambda response: response.sample):
            given = {judge: graded[response.key] for judge, graded in run.verdicts.items() if response.key in graded}
            question = own[response.prompt_id]
            question.answers.append(Answer(run.model, response, run.judges.get(question.prompt.set, ""), given))
    return _in_cases(joined.values())


def _picture(run: Run, prompt: Prompt, pictures: Mapping[Source, Picture]) -> Picture:
    """The image of a run's prompt; one without file and problem where it has none."""
    image = run.image(prompt)
    return Picture() if image is None else pictures[image]


def _in_cases(questions: Iterable[Question]) -> list[Question]:
    """Case by case, without questions that nobody answered."""
    by_case: dict[str, list[Question]] = {}
    for question in questions:
        if question.answers:
            by_case.setdefault(question.prompt.set, []).append(question)
    return [question for members in by_case.values() for question in members]
