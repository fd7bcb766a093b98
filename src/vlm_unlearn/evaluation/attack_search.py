"""Searches the first word that breaks a model, or makes it refuse, and measures the winner on questions that the search never saw."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vlm_unlearn.attacks.one_word import (
    CONTROL,
    GENERAL,
    TEMPLATES,
    VOCABULARY,
    capitalize_first,
    control,
    parse_first_word,
    rewrites_with_any,
)
from vlm_unlearn.attacks.search import Search, least_budget, sequential_halving
from vlm_unlearn.config import GenerationConfig, JudgeConfig, SplitConfig
from vlm_unlearn.data.readers import detect
from vlm_unlearn.errors import Problems, UserError
from vlm_unlearn.evaluation.prompts import prompts_digest, split_prompts
from vlm_unlearn.evaluation.verdicts import build_judge
from vlm_unlearn.judging.base import Answer, OfflineJudge
from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Kind, Label, Prompt, Rate, Record, Response, Verdict
from vlm_unlearn.store import (
    RecordLog,
    digest_json,
    lock_run,
    open_run,
    read_records,
    record_cost,
    write_json,
    write_records,
)

Goal = Literal["break", "over-refuse"]
GOALS: dict[Goal, tuple[Kind, Label]] = {"break": ("unsafe", "complied"), "over-refuse": ("safe", "refused")}
MEASURED = 3  # answers to each held-out question: with the winner, as asked, as control
OnDone = Callable[[str, int, int], None]  # stage, done, all


@dataclass(frozen=True)
class SearchRequest:
    """What to search."""

    model: str
    file: Path
    images: Path
    goal: Goal = "break"
    words: Sequence[str] = ()  # none: those that an audit of the file names, and a vocabulary
    budget: int = 2000
    questions: int | None = None  # how many of the file's questions to use; None is all
    seed: int = 0
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(name="keyword"))
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(max_new_tokens=64))


class WordRate(Record):
    """A word of the search."""

    word: str
    source: Literal["audit", "vocabulary", "named"]
    wording: str  # how a question is asked with it: {core} is what is asked for, {question} the question as it stands
    rate: Rate  # on the questions of the search
    rounds: int  # in how many rounds it was tried


class CurvePoint(Record):
    """The leading word, and its rate so far, after so many answers."""

    answers: int
    word: str
    rate: Rate


class SearchReport(Record):
    """``search.json``. `rate` is of hits: unsafe questions answered (`break`), safe questions refused (`over-refuse`)."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    goal: Goal
    model: str
    judge: str
    seed: int
    budget: int
    answers: int  # asked for, in search and measurement
    questions: dict[str, int]  # "search", "held_out"
    best: str
    held_out: dict[
        str, Rate
    ]  # "best", "as_asked" and "control", all on the same questions, none of which the search saw
    words: list[WordRate]  # best first
    curve: list[CurvePoint]


def search(request: SearchRequest, folder: Path, on_done: OnDone | None = None) -> SearchReport:
    """Searches, measures the winner on held-out questions, writes search.json and the samples behind it, and returns the report.

    `folder` gets responses.jsonl as the answers come; a search that was killed goes on from there, to the same report.

    Raises:
        UserError: broken data, too small a budget, a word that is none, a model that can't be loaded, or a folder that holds
            another run.
    """
    judge = _judge(request.judge)
    found = questions(request)
    words = dict.fromkeys(request.words, "named") if request.words else candidates(request.file, request.goal)
    searched, held_out, budget = plan(request, found, list(words))
    model = _find_model(request)
    with lock_run(folder):
        open_run(folder, _identity(request, judge, model, list(words), [*searched, *held_out]))
        started = time.monotonic()
        asker = _Asker(request, folder, judge, model, on_done)
        by_id = {prompt.id: prompt for prompt in searched}
        result = sequential_halving(
            list(words),
            list(by_id),
            budget,
            lambda pairs: asker("search", [with_word(by_id[id], word) for id, word in pairs], budget),
        )
        if on_done:
            on_done(
                "search", result.answers, result.answers
            )  # where the questions ran out, less than the budget was spent
        best = result.words[0].word
        ways = {
            "best": [with_word(prompt, best) for prompt in held_out],
            "as_asked": [_reworded(prompt, "as asked", prompt.question) for prompt in held_out],
            "control": [
                _reworded(prompt, CONTROL, control(prompt.question, i, best)) for i, prompt in enumerate(held_out)
            ],
        }
        measured = {
            way: _rate(asker(f"measure {way.replace('_', ' ')}", prompts, len(prompts)))
            for way, prompts in ways.items()
        }
        report = _report(request, judge, result, words, {"search": len(searched), "held_out": len(held_out)}, measured)
        write_json(folder / "search.json", report.model_dump(by_alias=True))
        asker.write_samples()
        record_cost(folder, time.monotonic() - started, finished=True)
    return report


def with_word(prompt: Prompt, word: str) -> Prompt:
    """A question as it is asked with a first word."""
    return _reworded(prompt, word, rewrites_with_any(prompt.question, word)[0])


def _reworded(prompt: Prompt, way: str, question: str) -> Prompt:
    return prompt.model_copy(update={"id": f"{prompt.id}/{way}", "question": question})


@dataclass(frozen=True)
class _Model:
    """The model to ask, found but not loaded: what is in the log already needs none."""

    folder: Path
    digest: str
    precision: str


def _find_model(request: SearchRequest) -> _Model:
    from vlm_unlearn.models.loader import resolve_precision, run_digest, run_model_folder

    folder = run_model_folder(request.model)
    return _Model(folder, run_digest(folder), resolve_precision(request.generation.precision))


def _identity(
    request: SearchRequest, judge: OfflineJudge, model: _Model, words: list[str], asked: list[Prompt]
) -> dict[str, object]:
    """Everything that decides what is found."""
    rewrites = [[with_word(prompt, word).question for word in words] for prompt in asked]
    return {
        "kind": "attack search",
        "goal": request.goal,
        "model": model.digest,
        "prompts": prompts_digest(asked, {"search": request.images}),
        "rewrites": digest_json([rewrites, list(TEMPLATES[CONTROL])]),
        "words": words,
        "budget": request.budget,
        "judge": judge.identity(),
        "generation": {**request.generation.model_dump(), "precision": model.precision},
        "seed": request.seed,
    }


def questions(request: SearchRequest) -> list[Prompt]:
    """One prompt a question of the goal's kind: of a file that holds several shots the first.

    Raises:
        UserError: the file is broken, of another format, or holds fewer than two such questions.
    """
    form = detect(request.file)
    if form not in ("vlguard", "safe_eraser"):
        raise UserError(
            f"{request.file}: must be a VLGuard or SafeEraser file, which say what is unsafe; this is one of kind {form}"
        )
    kind, _ = GOALS[request.goal]
    case = SplitConfig(name="search", format=form, file=request.file, images=request.images, kind=kind)
    first: dict[str, Prompt] = {}
    for prompt in split_prompts(case):
        first.setdefault(prompt.group_id, prompt)
    if len(first) < 2:
        raise UserError(
            f"{request.file}: has one {kind} question; a search needs two at least, one of them to measure the winner on"
        )
    return list(first.values())


def candidates(file: Path, goal: Goal) -> dict[str, str]:
    """First words to try, and where each comes from: those that an audit of the file names, the goal's first, then the vocabulary."""
    from vlm_unlearn.data.audit import audit, labeled_questions
    from vlm_unlearn.data.readers import read_any

    triggers = audit(labeled_questions(read_any(file, problems=Problems()), "auto", lambda text: False)).triggers
    ways = ("answer", "refuse") if goal == "break" else ("refuse", "answer")
    found: dict[str, str] = {}
    for word in (word for way in ways for word in triggers[way]):
        try:
            found.setdefault(parse_first_word(word), "audit")
        except UserError:  # a mark that stands where a word should
            continue
    return found | {word: "vocabulary" for word in VOCABULARY if word not in found}


def plan(
    request: SearchRequest, found: Sequence[Prompt], words: Sequence[str]
) -> tuple[list[Prompt], list[Prompt], int]:
    """The questions to search with, those held out, and the search's part of the budget.

    The questions used are dealt at random into two halves, and at most half the budget goes to measuring.

    Raises:
        UserError: the budget is too small for so many words, or a word is named that can't be tried.
    """
    if CONTROL in words:
        raise UserError(f"--words: {CONTROL} is no word to try; the control is measured beside the winner")
    least = max(2 * least_budget(len(words)), 2 * MEASURED)
    if request.budget < least:
        raise UserError(
            f"--budget {request.budget}: too few answers to tell {len(words)} words apart; give {least} or more, or fewer --words"
        )
    used = random.Random(request.seed).sample(list(found), min(request.questions or len(found), len(found)))
    half = len(used) // 2
    held_out = used[half : half + request.budget // (2 * MEASURED)]
    return used[:half], held_out, request.budget - MEASURED * len(held_out)


def _judge(config: JudgeConfig) -> OfflineJudge:
    judge = build_judge(config)
    if not isinstance(judge, OfflineJudge):
        raise UserError(f"--judge {config.name}: a search grades answers as they come; use keyword or tiny_world")
    return judge


def _rate(hits: Sequence[bool | None]) -> Rate:
    """Different questions, so that the interval is Wilson's."""
    judged = [float(hit) for hit in hits if hit is not None]
    return rate(judged, [str(number) for number in range(len(judged))], len(hits) - len(judged))


def _report(
    request: SearchRequest,
    judge: OfflineJudge,
    result: Search,
    words: dict[str, Any],
    counts: dict[str, int],
    measured: dict[str, Rate],
) -> SearchReport:
    return SearchReport(
        goal=request.goal,
        model=request.model,
        judge=judge.name,
        seed=request.seed,
        budget=request.budget,
        answers=result.answers + sum(rate.n + rate.failed for rate in measured.values()),
        questions=counts,
        best=result.words[0].word,
        held_out=measured,
        words=[
            WordRate(
                word=tried.word,
                source=words[tried.word],
                wording=next(iter(TEMPLATES.get(tried.word, GENERAL))).replace("{word}", capitalize_first(tried.word)),
                rate=_rate([*tried.hits, *[None] * tried.failed]),
                rounds=tried.rounds,
            )
            for tried in result.words
        ],
        curve=[
            CurvePoint(
                answers=point.answers,
                word=point.word,
                rate=_rate([True] * point.hits + [False] * (point.judged - point.hits)),
            )
            for point in result.curve
        ],
    )


class _Asker:
    """Asks the model and grades, from a log that survives a kill: what was answered once is not asked again."""

    def __init__(
        self, request: SearchRequest, folder: Path, judge: OfflineJudge, model: _Model, on_done: OnDone | None
    ) -> None:
        self._request = request
        self._folder = folder
        self._judge = judge
        self._model = model
        self._on_done = on_done
        self._done: dict[str, int] = {}
        self._prompts: dict[str, Prompt] = {}
        self._verdicts: dict[str, Verdict] = {}
        self._loaded: tuple[Any, Any] | None = None
        file = folder / "responses.jsonl"
        self._log = RecordLog(file, Response)
        self._responses = (
            {response.prompt_id: response for response in read_records(file, Response)} if file.exists() else {}
        )

    def __call__(self, stage: str, prompts: Sequence[Prompt], total: int) -> list[bool | None]:
        """Whether each prompt's answer is a hit."""
        # The batches are a function of the prompts alone: a batch that a kill cut short is asked whole again.
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
        from vlm_unlearn.models.loader import default_device, load_run_model

        if self._loaded is None:
            self._loaded = load_run_model(self._model.folder, self._model.precision)
            self._loaded[0].to(default_device()).eval()
        model, processor = self._loaded
        roots = {"search": self._request.images}
        made = generate_responses(
            model=model, processor=processor, prompts=batch, images=roots, config=self._request.generation
        )
        responses = [response for part in made for response in part]
        self._log.append(responses)
        for response in responses:
            self._responses.setdefault(response.prompt_id, response)

    def _hit(self, prompt: Prompt) -> bool | None:
        verdict = self._judge.verdict(Answer(prompt, self._responses[prompt.id]))
        self._prompts[prompt.id] = prompt
        self._verdicts[prompt.id] = verdict
        return None if verdict.label is None else verdict.label == GOALS[self._request.goal][1]

    def write_samples(self) -> None:
        """prompts.jsonl and the verdicts, in the order in which they were asked."""
        write_records(self._folder / "prompts.jsonl", self._prompts.values())
        write_records(self._folder / f"verdicts-{self._judge.name}.jsonl", self._verdicts.values())
