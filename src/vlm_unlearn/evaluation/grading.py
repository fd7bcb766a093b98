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
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import read_json, write_json


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
    """The judges that the suite's metrics need, by the name that metrics call them; `""` is the suite's own."""
    metrics = [*suite.metrics.values(), *(suite.paper_metrics.values() if suite.paper else ())]
    named = {metric.judge for metric in metrics if metric.judge}
    return {"": suite.judge, **{name: judge for name, judge in suite.judges.items() if name in named}}


def cases_of(suite: Suite, judge: str) -> set[str]:
    """The cases whose answers a judge grades: all for the suite's own, for another those of its metrics."""
    if not judge:
        return {case.name for case in suite.cases}
    return {case for _, metric in suite.all_metrics() if metric.judge == judge for case in metric.cases}


def judge_run(folder: Path, config: JudgeConfig, on_done: OnDone | None = None, cases: Iterable[str] | None = None) -> Path:
    """Grades a run's answers; writes and returns verdicts-<judge>.jsonl. Verdicts of a judge that has changed are made anew.

    Args:
        cases: whose answers to grade; None is all.

    Raises:
        RequestError: the folder holds no finished generation.
    """
    judge = build_judge(config)
    prompts, responses = read_answers(folder)
    roots = image_roots(saved_suite(folder))
    wanted = set(roots) if cases is None else set(cases)
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
