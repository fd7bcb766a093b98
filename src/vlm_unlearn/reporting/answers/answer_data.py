"""Reads the questions, answers and verdicts of several runs, and joins the answers to each question."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm_unlearn.benchmarks import AnswersNotPublicError
from vlm_unlearn.config import BenchmarkConfig
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.benchmarks import benchmark_outcomes
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.prompts import image_roots
from vlm_unlearn.generation.base import ResponseKey
from vlm_unlearn.records import LABELS, Prompt, Response, Verdict
from vlm_unlearn.reporting.answers.thumbnails import ImageReference, Thumbnail
from vlm_unlearn.store import EvaluationRun, read_json, read_records


@dataclass(frozen=True)
class RunData:
    """The records of one evaluation run.

    Args:
        model: The model's name in the report.
        prompts: The prompts by id.
        responses: The model's answers.
        verdicts: For each judge the verdicts that it gave, by the answer's key.
        judges: For each split or benchmark the judge behind its rates.
        image_roots: For each split or benchmark the folder of its images.
        labels_by_judge: For each judge the labels that it can give.
    """

    model: str
    prompts: Mapping[str, Prompt]
    responses: list[Response]
    verdicts: Mapping[str, Mapping[ResponseKey, Verdict]]
    judges: Mapping[str, str]
    image_roots: Mapping[str, Path]
    labels_by_judge: Mapping[str, Collection[str]]

    def image(self, prompt: Prompt) -> ImageReference | None:
        """Returns the image of a prompt with its edits, or None if it has none."""
        if prompt.image is None:
            return None
        return self.image_roots.get(prompt.set), prompt.image, prompt.image_edits


@dataclass(frozen=True)
class GradedAnswer:
    """One answer of one model with all verdicts on it.

    Args:
        model: The model's name in the report.
        response: The answer.
        judge: The judge behind the model's rates.
        verdicts: The verdict of each judge that graded the answer.
    """

    model: str
    response: Response
    judge: str
    verdicts: Mapping[str, Verdict]


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with the answers of all models.

    Args:
        prompt: The prompt.
        thumbnail: The thumbnail of its image, without file and problem if the prompt has no image.
        answers: The answers by model and sample.
    """

    prompt: Prompt
    thumbnail: Thumbnail
    answers: list[GradedAnswer] = field(default_factory=list)


def read_run(model: str, path: Path) -> tuple[RunData, list[str]]:
    """Reads an evaluation with the verdicts of all its judges.

    Args:
        model: The model's name in the report.
        path: The evaluation's folder.

    Returns:
        The run, and a note for each file of verdicts or scores that could not be read completely.

    Raises:
        UserError: The folder is not an evaluation, or a file other than those of verdicts is invalid.
    """
    run = EvaluationRun(path)
    suite = saved_suite(run)
    prompts = {prompt.id: prompt for prompt in run.read_prompts()}
    responses = [response for response in run.read_responses() if response.prompt_id in prompts]
    verdicts: dict[str, Mapping[ResponseKey, Verdict]] = {}
    notes = []
    for judge, file in run.verdicts_files().items():
        verdicts[judge], error = _read_verdicts(file)
        if error is not None:
            notes.append(
                f"{model}: only {len(verdicts[judge]):,} verdicts of the judge {judge} are shown, because the end of "
                f"its file is not readable: {error}"
            )
    judges = {split.name: suite.judge.judge_id for split in suite.splits}
    for benchmark in suite.benchmarks:
        if benchmark.judge:
            judges[benchmark.name] = suite.judge_config(benchmark.judge).judge_id
            continue
        judge = judges[benchmark.name] = f"{benchmark.name}'s own scores"
        try:
            verdicts[judge] = _benchmark_scores(benchmark, judge, prompts, responses)
        except AnswersNotPublicError:
            continue
        except UserError as problem:
            notes.append(f"{model}: the answers to {benchmark.name} are shown without their scores: {problem}")
    try:
        roots = image_roots(suite)
    except UserError:  # a benchmark of another version of this package
        roots = {split.name: split.images for split in suite.splits}
    labels_by_judge = {judge: _judge_labels(run.judge_identity_file(judge)) for judge in verdicts}
    return RunData(model, prompts, responses, verdicts, judges, roots, labels_by_judge), notes


def _read_verdicts(file: Path) -> tuple[dict[ResponseKey, Verdict], UserError | None]:
    """Returns the verdicts up to the first invalid line, such as a killed process leaves, and that line's error."""
    verdicts: dict[ResponseKey, Verdict] = {}
    try:
        for verdict in read_records(file, Verdict):
            verdicts[verdict.key] = verdict
    except UserError as error:
        return verdicts, error
    return verdicts, None


def _judge_labels(file: Path) -> Collection[str]:
    """Returns the labels that a judge can give, from its identity file. Without one these are all labels."""
    identity = read_json(file) if file.is_file() else None
    labels = identity.get("labels") if isinstance(identity, dict) else None
    return [label for label in LABELS if label in labels] if isinstance(labels, list) else LABELS


def _benchmark_scores(
    config: BenchmarkConfig, judge: str, prompts: Mapping[str, Prompt], responses: Iterable[Response]
) -> dict[ResponseKey, Verdict]:
    """Returns a benchmark's official score of each answer as a verdict."""
    scores = benchmark_outcomes(config, prompts, responses, {}).values
    score_by_prompt = {f"{config.name}/{question}": score for question, score in scores.items()}
    return {
        (prompt_id, 0): Verdict(prompt_id=prompt_id, judge=judge, score=min(1.0, max(0.0, score)))
        for prompt_id, score in score_by_prompt.items()
        if prompt_id in prompts
    }


def join_prompts(runs: Sequence[RunData], thumbnails: Mapping[ImageReference, Thumbnail]) -> list[AnsweredPrompt]:
    """Joins the answers of all runs by prompt.

    Two runs share a prompt if the complete records and the images are equal. If only one of them still has the image,
    that image is shown for both.

    Args:
        runs: The runs.
        thumbnails: The thumbnails of all their images.

    Returns:
        The prompts that have an answer, by split and in the order in which they were asked. Their answers are in the
        order of `runs` and of the samples.
    """
    thumbnails_by_prompt: dict[Prompt, dict[str, Thumbnail]] = {}
    for run in runs:
        for prompt in run.prompts.values():
            thumbnail = _prompt_thumbnail(run, prompt, thumbnails)
            thumbnails_by_prompt.setdefault(prompt, {}).setdefault(thumbnail.file, thumbnail)
    joined: dict[tuple[Prompt, str], AnsweredPrompt] = {}
    for run in runs:
        by_id: dict[str, AnsweredPrompt] = {}
        for prompt in run.prompts.values():
            candidates = thumbnails_by_prompt[prompt]
            files = [file for file in candidates if file]
            file = _prompt_thumbnail(run, prompt, thumbnails).file if len(files) > 1 else "".join(files)
            by_id[prompt.id] = joined.setdefault((prompt, file), AnsweredPrompt(prompt, candidates[file]))
        for response in sorted(run.responses, key=lambda response: response.sample):
            verdicts = {judge: graded[response.key] for judge, graded in run.verdicts.items() if response.key in graded}
            answered = by_id[response.prompt_id]
            judge = run.judges.get(answered.prompt.set, "")
            answered.answers.append(GradedAnswer(run.model, response, judge, verdicts))
    by_split: dict[str, list[AnsweredPrompt]] = {}
    for answered in joined.values():
        if answered.answers:
            by_split.setdefault(answered.prompt.set, []).append(answered)
    return [answered for members in by_split.values() for answered in members]


def _prompt_thumbnail(run: RunData, prompt: Prompt, thumbnails: Mapping[ImageReference, Thumbnail]) -> Thumbnail:
    image = run.image(prompt)
    return Thumbnail() if image is None else thumbnails[image]
