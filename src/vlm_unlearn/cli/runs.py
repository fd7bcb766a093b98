"""Finds the evaluations that a command is given, and the names of their models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def named_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """Returns the evaluation folders by the names of their models.

    A name is that of the run's summary, or of its folder. If two names are equal, all runs are named by their paths.
    The folder of a demo counts as its evaluations, in the order of its summary.

    Raises:
        UserError: Two of the folders are the same run.
    """
    from vlm_unlearn.errors import UserError

    runs = [run for folder in folders for run in _evaluations(folder)]
    absolute = [run.resolve() for run in runs]
    repeated = next((run for run in runs if absolute.count(run.resolve()) > 1), None)
    if repeated is not None:
        raise UserError("occurs twice. Name each run once.", code="duplicate-id", file=repeated)
    names = [_name(run) for run in absolute]
    return dict(zip(names if len(set(names)) == len(names) else map(str, runs), runs, strict=True))


def _evaluations(path: Path) -> list[Path]:
    """Returns the evaluations of a demo folder, or any other folder itself."""
    from vlm_unlearn.store import EvaluationRun

    evaluations = path / "evaluations"
    if EvaluationRun(path).suite_file.is_file() or not evaluations.is_dir():
        return [path]
    runs = sorted(run for run in evaluations.iterdir() if EvaluationRun(run).suite_file.is_file())
    order = _models(path)
    return sorted(runs, key=lambda run: order.index(run.name) if run.name in order else len(order)) or [path]


def _name(run: Path) -> str:
    return next(iter(_models(run)), run.name)


def _models(path: Path) -> list[str]:
    """Returns the models of a folder's summary, or an empty list if it has no valid summary."""
    from vlm_unlearn.store import SUMMARY, read_json

    try:
        return [str(row["model"]) for row in read_json(path / SUMMARY)["rows"]]
    except Exception:
        return []
