"""The three steps of an evaluation in one call: generate, judge, score."""

from __future__ import annotations

from os import PathLike

from vlm_unlearn.config import Suite
from vlm_unlearn.evaluation.generate import OnDone, generate_run
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.evaluation.verdicts import judge_run, splits_judged_by, suite_judges
from vlm_unlearn.judging.base import build_judge
from vlm_unlearn.records import Row
from vlm_unlearn.store import EvaluationRun


def evaluate_run(
    suite: Suite, run: str | PathLike[str], name: str, on_done: OnDone | None = None, verify_batching: int = 0
) -> Row:
    """Evaluates a model by a suite: generates answers, grades them with the suite's judges and computes the rates.

    The function can be called again after an interruption. It resumes, and repeats no finished step. If several
    processes were started together, only the first one calls this function. The others call `generate_run`, which is
    the only step that they share.

    Args:
        suite: The suite, with the model, the judges and the metrics.
        run: The run folder, as a path or as an `EvaluationRun`.
        name: The model's name in summary.json.
        on_done: Called with the stage and the number of finished and of all items.
        verify_batching: As in `generate_run`.

    Returns:
        The row that is written to summary.json.

    Raises:
        UserError: The suite or its data are broken, a model cannot be loaded, or the folder contains another run.
        RunError: A server does not respond, or another process of the run has ended.
    """
    run = EvaluationRun(run)
    generated = run.is_finished
    judges = suite_judges(suite)
    for config in judges.values():
        judge = build_judge(config)  # a suite without a usable judge fails here, before hours of generation
        if not generated:
            judge.check_available()
    generate_run(suite, run, on_done, verify_batching)
    for judge_name, config in judges.items():
        judge_run(run, config, on_done, splits_judged_by(suite, judge_name))
    return score_run(run, suite, name)
