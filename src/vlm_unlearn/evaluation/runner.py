"""generate, judge and score in one go."""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.config import Suite
from vlm_unlearn.evaluation.generating import OnDone, generate_run
from vlm_unlearn.evaluation.grading import build_judge, cases_of, judge_run, suite_judges
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.records import Row


def evaluate_run(suite: Suite, folder: Path, name: str, on_done: OnDone | None = None, verify_batching: int = 0) -> Row:
    """Asks a suite's model, grades its answers by every judge that the suite's metrics need, and derives the rates.

    Of several processes that were started together the first calls this, the others `generate_run`, which is what they share.

    Args:
        verify_batching: as in `generate_run`.
    """
    for judge in suite_judges(suite).values():
        build_judge(judge).look()  # a suite that can't be judged is refused before hours of generation
    generate_run(suite, folder, on_done, verify_batching)
    for called, judge in suite_judges(suite).items():
        judge_run(folder, judge, on_done, cases_of(suite, called))
    return score_run(folder, suite, name)
