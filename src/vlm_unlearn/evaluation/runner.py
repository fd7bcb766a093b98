"""generate, judge and score in one go."""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.config import Suite
from vlm_unlearn.evaluation.generate import OnDone, generate_run
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.evaluation.verdicts import build_judge, judge_run, splits_judged_by, suite_judges
from vlm_unlearn.records import Row
from vlm_unlearn.store import read_manifest


def evaluate_run(suite: Suite, folder: Path, name: str, on_done: OnDone | None = None, verify_batching: int = 0) -> Row:
    """Asks a suite's model, grades its answers by every judge that the suite's metrics need, and derives the rates.

    Of several processes that were started together the first calls this, the others `generate_run`, which is what they share.

    Args:
        verify_batching: as in `generate_run`.
    """
    answered = (folder / "manifest.json").is_file() and read_manifest(folder)["finished"]
    judges = suite_judges(suite)
    for config in judges.values():
        judge = build_judge(config)  # a suite that can't be judged is refused before hours of generation
        if not answered:
            judge.check_available()
    generate_run(suite, folder, on_done, verify_batching)
    for called, config in judges.items():
        judge_run(folder, config, on_done, splits_judged_by(suite, called))
    return score_run(folder, suite, name)
