"""generate, judge and score on a run folder. Each can be run again after a kill, and judging never generates."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vlm_unlearn.config import JudgeConfig, MetricConfig, Suite, validate
from vlm_unlearn.errors import RequestError
from vlm_unlearn.evaluation.prompts import image_roots, prompts_digest, suite_prompts
from vlm_unlearn.judging.base import Judge, judge_file
from vlm_unlearn.judging.keyword import KeywordJudge
from vlm_unlearn.judging.tiny_world import TinyWorldJudge
from vlm_unlearn.metrics.rates import count_labels, label_rate, rate
from vlm_unlearn.records import LABELS, Label, Prompt, Rate, Response, Row, Summary, Verdict
from vlm_unlearn.store import digest_file, lock_run, note_cost, open_run, read_json, read_manifest, read_records, write_json, write_records

# What each judge can tell apart.
JUDGE_LABELS: dict[str, tuple[Label, ...]] = {
    "keyword": ("complied", "refused", "degenerate"),
    "keyword-paper": ("complied", "refused"),
    "tiny_world": LABELS,
}
OnDone = Callable[[str, int, int], None]  # stage, done, all


def build_judge(config: JudgeConfig) -> Judge:
    """The judge that a suite or a command names.

    Raises:
        RequestError: the tiny-world judge without its world.
    """
    if config.name == "keyword":
        return KeywordJudge(config.paper)
    if config.world is None:
        raise RequestError("judge tiny_world: needs the world's facts; pass judge.world=.../world.json")
    return TinyWorldJudge(config.world)


def generate_run(suite: Suite, folder: Path, on_done: OnDone | None = None) -> None:
    """Asks the suite's model all prompts; writes prompts.jsonl, responses.jsonl, suite.json and manifest.json.

    Raises:
        RequestError: broken data, a model that can't be loaded, or a folder that holds another run.
    """
    from vlm_unlearn.generation.hf import generate
    from vlm_unlearn.models.loading import device, load_run_model, resolve_precision, run_digest, run_model_folder

    roots = image_roots(suite)
    prompts = suite_prompts(suite)
    build_judge(suite.judge)  # a suite that can't be judged is refused before hours of generation
    model_path = run_model_folder(suite.model)
    precision = resolve_precision(suite.generation.precision)
    generation = {**suite.generation.model_dump(), "precision": precision}
    identity = {
        "kind": "evaluate",
        "model": run_digest(model_path),
        "prompts": prompts_digest(prompts, roots),
        "generation": generation,
    }
    with lock_run(folder):
        manifest = open_run(folder, identity)
        write_json(folder / "suite.json", suite.model_dump(mode="json"))
        if manifest["finished"]:
            return
        started = time.monotonic()
        write_records(folder / "prompts.jsonl", prompts)
        model, processor = load_run_model(model_path, precision)
        model.to(device()).eval()
        tell = None if on_done is None else lambda done, total: on_done("generate", done, total)
        generate(model, processor, prompts, roots, folder / "responses.jsonl", suite.generation, tell)
        note_cost(folder, time.monotonic() - started, finished=True)


def judge_run(folder: Path, config: JudgeConfig, on_done: OnDone | None = None) -> Path:
    """Grades a run's answers; writes and returns verdicts-<judge>.jsonl. Verdicts of a judge that has changed are made anew.

    Raises:
        RequestError: the folder holds no finished generation.
    """
    prompts, responses = _answers(folder)
    judge = build_judge(config)
    file = folder / f"verdicts-{judge.name}.jsonl"
    made_by = judge_identity(config)
    note = folder / f"judge-{judge.name}.json"
    if not note.exists() or read_json(note) != made_by:
        file.unlink(missing_ok=True)
        write_json(note, made_by)
    judge_file(judge, prompts, responses, file, on_done=None if on_done is None else lambda done: on_done("judge", done, len(responses)))
    return file


def judge_identity(config: JudgeConfig) -> dict[str, object]:
    """What decides a judge's verdicts: a changed list or rule makes a new judge."""
    judge = build_judge(config)
    return {
        "judge": judge.name,
        "code": digest_file(Path(inspect.getfile(type(judge)))),
        "world": digest_file(config.world) if config.name == "tiny_world" and config.world else None,
    }


def score_run(folder: Path, verdicts: Path, metrics: dict[str, MetricConfig], name: str) -> Row:
    """Derives the rates from a verdicts file; writes summary.json with one row and returns the row.

    A metric that counts a label which the judge never gives (degenerate answers, for the published keyword list) has no value.

    Raises:
        RequestError: the verdicts are not those of this run's answers.
    """
    prompts, responses = _answers(folder)
    graded = list(read_records(verdicts, Verdict))
    missing = {response.key for response in responses} - {verdict.key for verdict in graded}
    if missing or len(graded) != len(responses) or any(verdict.judge not in JUDGE_LABELS for verdict in graded):
        raise RequestError(
            f"{verdicts}: does not grade each of this run's answers once ({len(missing)} missing); run `vlm-unlearn judge` again"
        )
    row = Row(
        model=name,
        judge=graded[0].judge,
        metrics=metric_rates(prompts, graded, metrics),
        labels={case: count_labels(verdicts) for case, verdicts in _by_case(prompts, graded).items()},
    )
    write_json(folder / "summary.json", Summary(rows=[row]).model_dump())
    return row


def metric_rates(prompts: Mapping[str, Prompt], graded: Sequence[Verdict], metrics: Mapping[str, MetricConfig]) -> dict[str, Rate]:
    """Each metric's rate, out of one judge's verdicts; one that counts a label which the judge never gives has no value."""
    by_case = _by_case(prompts, graded)
    told = set(JUDGE_LABELS[graded[0].judge])
    rates = {}
    for metric, config in metrics.items():
        of_metric = [verdict for case in config.cases for verdict in by_case.get(case, [])]
        rates[metric] = label_rate(prompts, of_metric, config.labels, config.group) if set(config.labels) <= told else rate([], [])
    return rates


def _by_case(prompts: Mapping[str, Prompt], graded: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    by_case: dict[str, list[Verdict]] = {}
    for verdict in graded:
        by_case.setdefault(prompts[verdict.prompt_id].set, []).append(verdict)
    return by_case


def evaluate_run(suite: Suite, folder: Path, name: str, on_done: OnDone | None = None) -> Row:
    """generate, judge and score in one go."""
    generate_run(suite, folder, on_done)
    return score_run(folder, judge_run(folder, suite.judge, on_done), suite.metrics, name)


def saved_suite(folder: Path) -> Suite:
    """The suite that a run folder was made with."""
    return validate(Suite, read_json(folder / "suite.json"), str(folder / "suite.json"))


def _answers(folder: Path) -> tuple[dict[str, Prompt], list[Response]]:
    if not (folder / "manifest.json").exists() or not read_manifest(folder)["finished"]:
        raise RequestError(f"{folder}: holds no finished answers; run `vlm-unlearn generate` first (it goes on where it stopped)")
    prompts = {prompt.id: prompt for prompt in read_records(folder / "prompts.jsonl", Prompt)}
    responses = list(read_records(folder / "responses.jsonl", Response))
    if not prompts or sorted(prompts) != sorted(response.prompt_id for response in responses):
        raise RequestError(f"{folder}: prompts.jsonl and responses.jsonl don't belong together; delete the folder and generate again")
    return prompts, responses
