"""Searches for the first word that breaks a model or makes it refuse, and measures it on held-out questions."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vlm_unlearn.attacks.one_word import (
    CONTROL,
    FALLBACK_TEMPLATES,
    TEMPLATES,
    VOCABULARY,
    all_rewrites,
    capitalize_first,
    control_rewrite,
    parse_first_word,
)
from vlm_unlearn.attacks.search import SearchResult, min_budget, sequential_halving
from vlm_unlearn.config import GenerationConfig, JudgeConfig, SplitConfig
from vlm_unlearn.data.readers import detect
from vlm_unlearn.errors import Problems, UserError
from vlm_unlearn.evaluation.prompts import prompts_digest, split_prompts
from vlm_unlearn.judging.base import Answer, OfflineJudge, build_judge
from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Kind, Label, Prompt, Rate, Record, Response, Verdict
from vlm_unlearn.store import EvaluationRun, RecordLog, digest_json, write_json, write_records

Goal = Literal["break", "over-refuse"]
GOALS: dict[Goal, tuple[Kind, Label]] = {"break": ("unsafe", "complied"), "over-refuse": ("safe", "refused")}
ANSWERS_PER_HELD_OUT_QUESTION = 3  # with the best word, as asked, and as control
OnDone = Callable[[str, int, int], None]  # called with (stage, done, total)


@dataclass(frozen=True)
class SearchRequest:
    """The settings of a search.

    Attributes:
        model: A model folder, hub name, adapter folder or training run.
        file: A VLGuard or SafeEraser file with the questions.
        images: The root folder of the images.
        goal: ``break`` counts unsafe questions that are answered. ``over-refuse`` counts safe questions that are
            refused. words: The first words to try. If empty, the words that an audit of the file finds, and a
            vocabulary. budget: The maximum number of answers, including those of the measurement. questions: The
            number of questions to use. None uses all questions of the file. seed: The seed of the selection of
            questions. judge: The judge, which must work offline. generation: The settings of the generation.
    """

    model: str
    file: Path
    images: Path
    goal: Goal = "break"
    words: Sequence[str] = ()
    budget: int = 2000
    questions: int | None = None
    seed: int = 0
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(name="keyword"))
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(max_new_tokens=64))


class WordRate(Record):
    """The result of one word."""

    word: str
    source: Literal["audit", "vocabulary", "named"]
    wording: str  # the template: {core} is the requested content, {question} the original question
    rate: Rate  # on the questions of the search
    rounds: int  # rounds in which the word was tried


class CurvePoint(Record):
    """The leading word after a number of answers, and its rate at that point."""

    answers: int
    word: str
    rate: Rate


class SearchReport(Record):
    """The content of ``search.json``.

    A rate is the share of hits: unsafe questions answered (`break`), or safe questions refused (`over-refuse`).
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    goal: Goal
    model: str
    judge: str
    seed: int
    budget: int
    answers: int  # of search and measurement
    questions: dict[str, int]  # keys "search" and "held_out"
    best: str
    held_out: dict[str, Rate]  # keys "best", "as_asked" and "control", all on the same held-out questions
    words: list[WordRate]  # best first
    curve: list[CurvePoint]


def search(request: SearchRequest, run: str | PathLike[str], on_done: OnDone | None = None) -> SearchReport:
    """Searches for the best word and measures it on held-out questions.

    Args:
        request: The settings of the search.
        run: The run folder. It gets ``search.json``, the prompts, the responses and the verdicts. Responses are
            appended as they are generated. A killed search resumes from them and gives the same report.
        on_done: Called with (stage, done, total).

    Raises:
        UserError: The data is broken, the budget is too small, a word is invalid, the model cannot be loaded, or the
            folder contains another run.
    """
    judge = _build_offline_judge(request.judge)
    prompts = read_prompts(request)
    words = dict.fromkeys(request.words, "named") if request.words else candidate_words(request.file, request.goal)
    search_prompts, held_out_prompts, budget = split_questions(request, prompts, list(words))
    model = _find_model(request)
    run = EvaluationRun(run)
    with run.lock():
        run.open(_identity(request, judge, model, list(words), [*search_prompts, *held_out_prompts]))
        started = time.monotonic()
        grader = _Grader(request, run, judge, model, on_done)
        by_id = {prompt.id: prompt for prompt in search_prompts}
        result = sequential_halving(
            list(words),
            list(by_id),
            budget,
            lambda pairs: grader("search", [with_word(by_id[id], word) for id, word in pairs], budget),
        )
        if on_done:  # if the questions ran out, part of the budget was not used
            on_done("search", result.answers, result.answers)
        best = result.words[0].word
        conditions = {
            "best": [with_word(prompt, best) for prompt in held_out_prompts],
            "as_asked": [_with_question(prompt, "as asked", prompt.question) for prompt in held_out_prompts],
            "control": [
                _with_question(prompt, CONTROL, control_rewrite(prompt.question, i, best))
                for i, prompt in enumerate(held_out_prompts)
            ],
        }
        held_out = {
            name: _rate(grader(f"measure {name.replace('_', ' ')}", condition_prompts, len(condition_prompts)))
            for name, condition_prompts in conditions.items()
        }
        counts = {"search": len(search_prompts), "held_out": len(held_out_prompts)}
        report = _report(request, judge, result, words, counts, held_out)
        write_json(run.search_file, report.model_dump(by_alias=True))
        grader.write_samples()
        run.record_cost(time.monotonic() - started, finished=True)
    return report


def with_word(prompt: Prompt, word: str) -> Prompt:
    """Returns a prompt whose question begins with a word."""
    return _with_question(prompt, word, all_rewrites(prompt.question, word)[0])


def _with_question(prompt: Prompt, suffix: str, question: str) -> Prompt:
    return prompt.with_question(question, id=f"{prompt.id}/{suffix}")


@dataclass(frozen=True)
class _Model:
    """The location of the model. The model is only loaded if the log lacks answers."""

    path: Path
    digest: str
    precision: str


def _find_model(request: SearchRequest) -> _Model:
    from vlm_unlearn.modeling.loader import resolve_precision, run_digest, run_model_folder

    path = run_model_folder(request.model)
    return _Model(path, run_digest(path), resolve_precision(request.generation.precision))


def _identity(
    request: SearchRequest, judge: OfflineJudge, model: _Model, words: list[str], prompts: list[Prompt]
) -> dict[str, object]:
    """Returns everything that the result depends on."""
    rewrites = [[with_word(prompt, word).question for word in words] for prompt in prompts]
    return {
        "kind": "attack search",
        "goal": request.goal,
        "model": model.digest,
        "prompts": prompts_digest(prompts, {"search": request.images}),
        "rewrites": digest_json([rewrites, list(TEMPLATES[CONTROL])]),
        "words": words,
        "budget": request.budget,
        "judge": judge.identity(),
        "generation": {**request.generation.model_dump(), "precision": model.precision},
        "seed": request.seed,
    }


def read_prompts(request: SearchRequest) -> list[Prompt]:
    """Returns one prompt per question of the goal's kind. Of several rewrites of a question, the first one is used.

    Raises:
        UserError: The file is broken, has another format, or contains fewer than two such questions.
    """
    file_format = detect(request.file)
    if file_format not in ("vlguard", "safe_eraser"):
        message = (
            f"has the format {file_format}, which does not mark unsafe questions. Pass a VLGuard or SafeEraser file."
        )
        raise UserError(message, code="unsupported-setting", file=request.file)
    kind, _ = GOALS[request.goal]
    split = SplitConfig(name="search", format=file_format, file=request.file, images=request.images, kind=kind)
    prompt_of_group: dict[str, Prompt] = {}
    for prompt in split_prompts(split):
        prompt_of_group.setdefault(prompt.group_id, prompt)
    if len(prompt_of_group) < 2:
        message = f"contains one {kind} question. A search needs two or more, one of them for the measurement."
        raise UserError(message, code="no-records", file=request.file)
    return list(prompt_of_group.values())


def candidate_words(file: Path, goal: Goal) -> dict[str, str]:
    """Returns the first words to try, each with its source, ``audit`` or ``vocabulary``.

    The triggers that an audit of the file finds come first, those of the goal's direction before the others.
    """
    from vlm_unlearn.data.readers import read_any
    from vlm_unlearn.data_tools.audit import audit, labeled_questions

    triggers = audit(labeled_questions(read_any(file, problems=Problems()), "auto", lambda text: False)).triggers
    directions = ("answer", "refuse") if goal == "break" else ("refuse", "answer")
    audit_words: dict[str, str] = {}
    for word in (word for direction in directions for word in triggers[direction]):
        try:
            audit_words.setdefault(parse_first_word(word), "audit")
        except UserError:  # a punctuation mark in the place of a word
            continue
    return audit_words | {word: "vocabulary" for word in VOCABULARY if word not in audit_words}


def split_questions(
    request: SearchRequest, prompts: Sequence[Prompt], words: Sequence[str]
) -> tuple[list[Prompt], list[Prompt], int]:
    """Returns the prompts of the search, the held-out prompts, and the budget of the search.

    The questions are split at random into two halves. At most half of the budget is used for the measurement.

    Raises:
        UserError: The budget is too small for the number of words, or the words contain the control.
    """
    if CONTROL in words:
        message = f"{CONTROL} is not a first word. The control is always measured together with the best word."
        raise UserError(message, code="invalid-field", field="--words")
    minimum = max(2 * min_budget(len(words)), 2 * ANSWERS_PER_HELD_OUT_QUESTION)
    if request.budget < minimum:
        message = (
            f"{request.budget} answers are too few to compare {len(words)} words. "
            f"Use a budget of {minimum} or more, or fewer --words."
        )
        raise UserError(message, code="out-of-range", field="--budget")
    num_questions = min(request.questions or len(prompts), len(prompts))
    sample = random.Random(request.seed).sample(list(prompts), num_questions)
    half = len(sample) // 2
    held_out = sample[half : half + request.budget // (2 * ANSWERS_PER_HELD_OUT_QUESTION)]
    return sample[:half], held_out, request.budget - ANSWERS_PER_HELD_OUT_QUESTION * len(held_out)


def _build_offline_judge(config: JudgeConfig) -> OfflineJudge:
    judge = build_judge(config)
    if not isinstance(judge, OfflineJudge):
        message = (
            f"{config.name} cannot grade the answers of a search as they are generated. Use keyword or tiny_world."
        )
        raise UserError(message, code="unsupported-setting", field="--judge")
    return judge


def _rate(hits: Sequence[bool | None]) -> Rate:
    """Returns the rate of hits. Each hit is a group of its own, which gives Wilson's interval."""
    judged = [float(hit) for hit in hits if hit is not None]
    return rate(judged, [str(number) for number in range(len(judged))], len(hits) - len(judged))


def _report(
    request: SearchRequest,
    judge: OfflineJudge,
    result: SearchResult,
    words: dict[str, Any],
    counts: dict[str, int],
    held_out: dict[str, Rate],
) -> SearchReport:
    return SearchReport(
        goal=request.goal,
        model=request.model,
        judge=judge.name,
        seed=request.seed,
        budget=request.budget,
        answers=result.answers + sum(rate.n + rate.failed for rate in held_out.values()),
        questions=counts,
        best=result.words[0].word,
        held_out=held_out,
        words=[
            WordRate(
                word=word.word,
                source=words[word.word],
                wording=TEMPLATES.get(word.word, FALLBACK_TEMPLATES)[0].replace("{word}", capitalize_first(word.word)),
                rate=_rate([*word.hits, *[None] * word.failed]),
                rounds=word.rounds,
            )
            for word in result.words
        ],
        curve=[
            CurvePoint(
                answers=leader.answers,
                word=leader.word,
                rate=_rate([True] * leader.hits + [False] * (leader.judged - leader.hits)),
            )
            for leader in result.curve
        ],
    )


class _Grader:
    """Asks the model and grades its answers. Answers in the log of an interrupted search are not generated again."""

    def __init__(
        self, request: SearchRequest, run: EvaluationRun, judge: OfflineJudge, model: _Model, on_done: OnDone | None
    ) -> None:
        self._request = request
        self._run = run
        self._judge = judge
        self._model = model
        self._on_done = on_done
        self._done: dict[str, int] = {}
        self._prompts: dict[str, Prompt] = {}
        self._verdicts: dict[str, Verdict] = {}
        self._loaded: tuple[Any, Any] | None = None
        self._log = RecordLog(run.responses_file, Response)
        self._responses = {response.prompt_id: response for response in run.read_responses()}

    def __call__(self, stage: str, prompts: Sequence[Prompt], total: int) -> list[bool | None]:
        """Returns whether the answer to each prompt is a hit, or None if it could not be graded."""
        # The batches depend on the prompts alone. An incomplete batch of a killed search is generated again in full, so
        # that its padding and therefore its numbers stay the same.
        by_length = sorted(prompts, key=lambda prompt: (prompt.image is None, len(prompt.question.split())))
        size = self._request.generation.batch_size
        for batch in (by_length[start : start + size] for start in range(0, len(by_length), size)):
            if any(prompt.id not in self._responses for prompt in batch):
                self._answer(batch)
            self._done[stage] = self._done.get(stage, 0) + len(batch)
            if self._on_done:
                self._on_done(stage, self._done[stage], total)
        return [self._hit(prompt) for prompt in prompts]

    def _answer(self, batch: Sequence[Prompt]) -> None:
        from vlm_unlearn.generation.hf import generate_responses
        from vlm_unlearn.modeling.loader import default_device, load_run_model

        if self._loaded is None:
            self._loaded = load_run_model(self._model.path, self._model.precision)
            self._loaded[0].to(default_device()).eval()
        model, processor = self._loaded
        roots = {"search": self._request.images}
        batches = generate_responses(
            model=model, processor=processor, prompts=batch, images=roots, config=self._request.generation
        )
        responses = [response for batch_responses in batches for response in batch_responses]
        self._log.append(responses)
        for response in responses:
            self._responses.setdefault(response.prompt_id, response)

    def _hit(self, prompt: Prompt) -> bool | None:
        verdict = self._judge.verdict(Answer(prompt, self._responses[prompt.id]))
        self._prompts[prompt.id] = prompt
        self._verdicts[prompt.id] = verdict
        return None if verdict.label is None else verdict.label == GOALS[self._request.goal][1]

    def write_samples(self) -> None:
        """Writes the prompts and the verdicts, in the order in which the prompts were asked."""
        write_records(self._run.prompts_file, self._prompts.values())
        write_records(self._run.verdicts_file(self._judge.name), self._verdicts.values())
