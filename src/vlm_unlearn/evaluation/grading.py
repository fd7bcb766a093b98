"""The second of three steps: grades a run's answers with a suite's judges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from vlm_unlearn.config import JudgeConfig, Suite
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import RequestError
from vlm_unlearn.evaluation.generating import OnDone, read_answers, saved_suite
from vlm_unlearn.evaluation.prompts import image_roots
from vlm_unlearn.judging.base import Answer, Judge, judge_file
from vlm_unlearn.judging.keyword import KeywordJudge
from vlm_unlearn.judging.llm import LLMJudge
from vlm_unlearn.judging.rouge import RougeJudge
from vlm_unlearn.judging.tiny_world import TinyWorldJudge
from vlm_unlearn.records import Prompt, Record, Response, Verdict
from vlm_unlearn.store import read_json, read_records, write_json


def build_judge(config: JudgeConfig) -> Judge:
    """The judge that a suite or a command names.

    Raises:
        RequestError: something that the judge needs is not there.
    """
    if config.name == "keyword":
        return KeywordJudge(config.paper)
    if config.name == "rouge_l":
        return RougeJudge(config.paper)
    if config.name == "llm":
        return LLMJudge(config)
    if config.world is None:
        raise RequestError("judge tiny_world: needs the world's facts; pass judge.world=.../world.json")
    return TinyWorldJudge(config.world)


def suite_judges(suite: Suite) -> dict[str, JudgeConfig]:
    """The judges that the suite's metrics need, by the name that metrics call them; `""` is the suite's own.

    Where the suite's own asks no language model, those of its others that have no model are left out: `unmeasured` names what they
    would have measured.
    """
    metrics = [*suite.metrics.values(), *(suite.paper_metrics.values() if suite.paper else ())]
    named = {needs.judge for needs in (*metrics, *suite.benchmarks)}
    own = {"": suite.judge} if suite.cases else {}
    others = {name: judge for name, judge in suite.judges.items() if name in named}
    nobody = [name for name, judge in others.items() if judge.name == "llm" and judge.model is None and suite.judge.name != "llm"]
    return own | {name: judge for name, judge in others.items() if name not in nobody}


def unmeasured(suite: Suite) -> list[str]:
    """The metrics and benchmarks whose judge is a language model that nobody named."""
    judges = suite_judges(suite)
    counted = {**suite.metrics, **({f"{name} (published)": metric for name, metric in suite.paper_metrics.items()} if suite.paper else {})}
    open_metrics = [name for name, metric in counted.items() if metric.judge not in judges]
    return open_metrics + [benchmark.name for benchmark in suite.benchmarks if benchmark.judge and benchmark.judge not in judges]


def cases_of(suite: Suite, judge: str) -> set[str]:
    """The cases and benchmarks whose answers a judge grades: all cases for the suite's own, for another those of its metrics."""
    if not judge:
        return {case.name for case in suite.cases}
    of_metrics = {case for _, metric in suite.all_metrics() if metric.judge == judge for case in metric.cases}
    return of_metrics | {benchmark.name for benchmark in suite.benchmarks if benchmark.judge == judge}


def judge_run(folder: Path, config: JudgeConfig, on_done: OnDone | None = None, cases: Iterable[str] | None = None) -> Path:
    """Grades a run's answers; writes and returns verdicts-<judge>.jsonl. Verdicts of a judge that has changed are made anew.

    Args:
        cases: whose answers to grade; None is all cases, or of a suite without any all benchmarks.

    Raises:
        RequestError: the folder holds no finished generation.
    """
    judge = build_judge(config)
    prompts, responses = read_answers(folder)
    suite = saved_suite(folder)
    roots = image_roots(suite)
    wanted = ({case.name for case in suite.cases} or set(roots)) if cases is None else set(cases)
    answers = _answers(prompts, [response for response in responses if prompts[response.prompt_id].set in wanted], roots)
    file = folder / f"verdicts-{judge.name}.jsonl"
    made_by = {**judge.identity(), "labels": list(judge.labels)}
    note = folder / f"judge-{judge.name}.json"
    if not note.exists() or read_json(note) != made_by:
        file.unlink(missing_ok=True)
        write_json(note, made_by)
    judge_file(judge, answers, file, None if on_done is None else lambda done: on_done(f"judge {judge.name}", done, len(answers)))
    return file


def _answers(prompts: Mapping[str, Prompt], responses: Iterable[Response], roots: Mapping[str, Path]) -> list[Answer]:
    first: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts.values():
        known = first.setdefault((prompt.set, prompt.group_id), prompt)
        if prompt.shot < known.shot:
            first[prompt.set, prompt.group_id] = prompt
    answers = []
    for response in responses:
        prompt = prompts[response.prompt_id]
        image = None if prompt.image is None else resolve_image(roots[prompt.set], prompt.image, f'prompt "{prompt.id}"')
        answers.append(Answer(prompt, response, image, first[prompt.set, prompt.group_id].question))
    return answers


class Cost(Record):
    """What one judge's verdicts took."""

    judge: str
    verdicts: int
    failed: int  # without a label and a score
    asked: int  # of a language model; a verdict that came from the cache counts too
    tokens_read: int
    tokens_written: int
    cost: float | None = None  # by the config's prices, where it has some

    def words(self) -> str:
        """``"1,204 verdicts, 3 failed; 310,000 tokens read, 12,000 written"``"""
        told = f"{self.verdicts:,} verdicts, {self.failed:,} failed"
        if self.tokens_read:
            told += f"; {self.tokens_read:,} tokens read, {self.tokens_written:,} written"
        return told if self.cost is None else f"{told}, cost {self.cost:,.2f}"


def judge_cost(file: Path, config: JudgeConfig) -> Cost:
    """Adds up what the verdicts of a file took."""
    judge, verdicts, failed, asked, read, written = "", 0, 0, 0, 0, 0
    for verdict in read_records(file, Verdict):
        judge = verdict.judge
        verdicts += 1
        failed += verdict.label is None and verdict.score is None
        asked += verdict.tokens is not None
        read += verdict.tokens[0] if verdict.tokens else 0
        written += verdict.tokens[1] if verdict.tokens else 0
    priced = config.input_price or config.output_price
    cost = (read * config.input_price + written * config.output_price) / 1e6 if priced else None
    return Cost(judge=judge, verdicts=verdicts, failed=failed, asked=asked, tokens_read=read, tokens_written=written, cost=cost)


def judge_remarks(folder: Path, suite: Suite) -> list[str]:
    """What is to be said of a run's judging: what language models took, what failed, and what nobody was there to judge."""
    told = []
    for config in suite_judges(suite).values():
        file = folder / f"verdicts-{build_judge(config).name}.jsonl"
        cost = judge_cost(file, config) if file.exists() else None
        if cost is not None and (cost.tokens_read or cost.failed):
            told.append(f"judge {cost.judge}: {cost.words()}" + ("; `vlm-unlearn judge run` tries them again" if cost.failed else ""))
    left_out = unmeasured(suite)
    return [*told, f"not measured, for want of a language model (judge.model=...): {', '.join(left_out)}"] if left_out else told
