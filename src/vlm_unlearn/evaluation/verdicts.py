"""The second of three steps: grades a run's answers with a suite's judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field

from vlm_unlearn.config import JudgeConfig, Suite
from vlm_unlearn.errors import RunError, UserError, nearest, quoted
from vlm_unlearn.evaluation.generate import OnDone, read_answers, saved_suite
from vlm_unlearn.evaluation.prompts import image_roots
from vlm_unlearn.judging.base import Answer, Judge, judge_file
from vlm_unlearn.judging.keyword import KeywordJudge
from vlm_unlearn.judging.rouge import RougeJudge
from vlm_unlearn.judging.tiny_world import TinyWorldJudge
from vlm_unlearn.records import Prompt, Record, Response, Verdict
from vlm_unlearn.store import lock_run, read_json, read_records, write_json


def build_judge(config: JudgeConfig) -> Judge:
    """The judge that a suite or a command names.

    Raises:
        UserError: something that the judge needs is not there.
    """
    if config.name == "keyword":
        return KeywordJudge(config.paper_compat)
    if config.name == "rouge_l":
        return RougeJudge(config.paper_compat)
    if config.name == "llm":
        from vlm_unlearn.judging.llm import LLMJudge

        return LLMJudge(config)
    if config.world is None:
        raise UserError("judge tiny_world: needs the world's facts; pass judge.world=.../world.json")
    return TinyWorldJudge(config.world)


def suite_judges(suite: Suite) -> dict[str, JudgeConfig]:
    """The judges that the suite's metrics need, by the name that metrics call them; `""` is the suite's own.

    Where the suite's own asks no language model, those of its others that have no model are left out: `unmeasured` names what they
    would have measured.
    """
    named = {metric.judge for metric in suite.active_metrics()} | {benchmark.judge for benchmark in suite.benchmarks}
    own = {"": suite.judge} if suite.splits else {}
    others = {name: suite.judge_config(name) for name in suite.judges if name in named}
    nobody = [
        name
        for name, judge in others.items()
        if judge.name == "llm" and judge.model is None and suite.judge.name != "llm"
    ]
    found = own | {name: judge for name, judge in others.items() if name not in nobody}
    _refuse_one_name_for_two(found)
    return found


def _refuse_one_name_for_two(judges: Mapping[str, JudgeConfig]) -> None:
    first: dict[str, JudgeConfig] = {}
    for called, judge in judges.items():
        if first.setdefault(judge.judge_id, judge).fingerprint_fields() != judge.fingerprint_fields():
            raise UserError(
                f"judges.{called}: its verdicts would have the name {judge.judge_id}, as another judge's of this suite; "
                "give it another rubric or model, or judge with it apart (`vlm-unlearn judge run`)"
            )


def metrics_without_judge(suite: Suite) -> list[str]:
    """The metrics and benchmarks whose judge is a language model that nobody named."""
    judges = suite_judges(suite)
    published = suite.paper_metrics if suite.paper_compat else {}
    open_metrics = [name for name, metric in suite.metrics.items() if metric.judge not in judges]
    open_metrics += [f"{name} (published)" for name, metric in published.items() if metric.judge not in judges]
    return open_metrics + [
        benchmark.name for benchmark in suite.benchmarks if benchmark.judge and benchmark.judge not in judges
    ]


def splits_judged_by(suite: Suite, judge: str) -> set[str]:
    """The cases and benchmarks whose answers a judge grades: all cases for the suite's own, for another those of its metrics."""
    if not judge:
        return {case.name for case in suite.splits}
    of_metrics = {case for metric in suite.active_metrics() if metric.judge == judge for case in metric.splits}
    return of_metrics | {benchmark.name for benchmark in suite.benchmarks if benchmark.judge == judge}


def judge_run(
    folder: Path, config: JudgeConfig, on_done: OnDone | None = None, cases: Iterable[str] | None = None
) -> Path:
    """Grades a run's answers; writes and returns verdicts-<judge>.jsonl. Verdicts of a judge that has changed are made anew.

    Args:
        cases: whose answers to grade, cases and benchmarks; None is all cases.

    Raises:
        UserError: the folder holds no finished generation or no such case, or another process is at work in it.
    """
    judge = build_judge(config)
    prompts, responses = read_answers(folder)
    suite = saved_suite(folder)
    roots = image_roots(suite)
    wanted = {case.name for case in suite.splits} if cases is None else set(cases)
    unknown = next(iter(wanted - set(roots)), None)
    if unknown is not None or not wanted:
        what = (
            f"no case {quoted(unknown)}{nearest(unknown, roots)}"
            if unknown is not None
            else "no cases, which a judge would grade unasked"
        )
        raise UserError(f"{folder}: has {what}; name what to grade with --split; there are {', '.join(roots)}")
    answers = _answers(
        prompts, [response for response in responses if prompts[response.prompt_id].set in wanted], roots
    )
    file, note = folder / f"verdicts-{judge.name}.jsonl", folder / f"judge-{judge.name}.json"
    made_by = {**judge.identity(), "labels": list(judge.labels)}
    with lock_run(folder):
        known = read_json(note) if note.exists() else None
        if not isinstance(known, dict) or {**known, "config": None} != {**made_by, "config": None}:
            _put_aside(file, note)
        write_json(note, {**made_by, "config": config.fingerprint_fields()})
        judge_file(
            judge,
            answers,
            file,
            None if on_done is None else lambda done: on_done(f"judge {judge.name}", done, len(answers)),
        )
    return file


def _put_aside(*files: Path) -> None:
    """Keeps what a judge gave before it changed, beside what it gives now; only the last such."""
    for file in files:
        if file.exists():
            file.replace(file.with_name(f"before-{file.name}"))


def _answers(prompts: Mapping[str, Prompt], responses: Iterable[Response], roots: Mapping[str, Path]) -> list[Answer]:
    first: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts.values():
        known = first.setdefault((prompt.set, prompt.group_id), prompt)
        if prompt.rewrite < known.rewrite:
            first[prompt.set, prompt.group_id] = prompt
    found = ((prompts[response.prompt_id], response) for response in responses)
    return [
        Answer(prompt, response, roots[prompt.set], first[prompt.set, prompt.group_id].question)
        for prompt, response in found
    ]


class Cost(Record):
    """What one judge's verdicts took."""

    judge: str
    verdicts: int
    failed: int  # without a label and a score
    unread: int  # of these, replies that can't be read: asked again they would be the same
    asked: int  # of a language model; what came from the cache costs nothing
    tokens_read: int
    tokens_written: int
    cost: float | None = None  # by the config's prices, where it has some
    labels: dict[str, int] = Field(default_factory=dict)  # label -> verdicts
    score: float | None = None  # the mean, of a judge that gives scores
    error: str | None = None  # the commonest

    def words(self) -> str:
        """``"1,204 verdicts, 3 failed; 310,000 tokens read, 12,000 written"``"""
        told = f"{self.verdicts:,} verdicts, {self.failed:,} failed" + (
            f" ({self.unread:,} replies can't be read)" if self.unread else ""
        )
        if self.labels:
            told += (
                " (" + ", ".join(f"{count:,} {label.replace('_', ' ')}" for label, count in self.labels.items()) + ")"
            )
        if self.score is not None:
            told += f", mean score {self.score:.3f}"
        if self.error:
            told += f"; mostly: {quoted(self.error)}"
        if self.tokens_read:
            told += f"; {self.tokens_read:,} tokens read, {self.tokens_written:,} written"
        return told if self.cost is None else f"{told}, cost {self.cost:,.2f}"


def judge_cost(file: Path, config: JudgeConfig) -> Cost:
    """Adds up what the verdicts of a file took."""
    verdicts = list(read_records(file, Verdict))
    errors = Counter(verdict.error for verdict in verdicts if verdict.error is not None)
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    spent = [verdict.tokens for verdict in verdicts if verdict.tokens is not None]
    read, written = sum(tokens[0] for tokens in spent), sum(tokens[1] for tokens in spent)
    priced = config.input_price or config.output_price
    return Cost(
        judge=config.judge_id,
        verdicts=len(verdicts),
        failed=sum(verdict.label is None and verdict.score is None for verdict in verdicts),
        unread=sum(verdict.error is not None and verdict.raw is not None for verdict in verdicts),
        asked=len(spent),
        tokens_read=read,
        tokens_written=written,
        cost=(read * config.input_price + written * config.output_price) / 1e6 if priced else None,
        labels=Counter(verdict.label for verdict in verdicts if verdict.label is not None),
        score=sum(scores) / len(scores) if scores else None,
        error=next((error for error, _ in errors.most_common(1)), None),
    )


def suite_costs(folder: Path, suite: Suite) -> list[Cost]:
    """What the verdicts of a suite's judges took, of those that have graded the run."""
    files = {folder / f"verdicts-{config.judge_id}.jsonl": config for config in suite_judges(suite).values()}
    return [judge_cost(file, config) for file, config in files.items() if file.exists()]


def judge_remarks(costs: Iterable[Cost], suite: Suite) -> list[str]:
    """What is to be said of a run's judging: what language models took, what failed, and what nobody was there to judge."""
    told = []
    for cost in costs:
        if cost.tokens_read or cost.failed:
            again = "; `vlm-unlearn judge run` tries the others again" if cost.failed > cost.unread else ""
            told.append(f"judge {cost.judge}: {cost.words()}{again}")
    left_out = metrics_without_judge(suite)
    return (
        [*told, f"not measured, for want of a language model (judge.model=...): {', '.join(left_out)}"]
        if left_out
        else told
    )


def validate_any_verdict(costs: Iterable[Cost]) -> None:
    """A judge that gave not one verdict has not judged.

    Raises:
        RunError: there is one.
    """
    for cost in costs:
        if cost.verdicts and cost.failed == cost.verdicts:
            raise RunError(
                f"judge {cost.judge}: gave no verdict on any of {cost.verdicts:,} answers; mostly: {quoted(cost.error or '')}"
            )
