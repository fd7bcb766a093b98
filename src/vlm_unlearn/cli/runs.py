"""Which evaluations a command was given, and what to call their models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def named_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """The evaluations by their models' names: the names in their summaries, else the folders', or where two are the same, the paths.

    A demo's folder stands for its evaluations, in the order of its summary.

    Raises:
        UserError: a run is given twice, or a folder holds no evaluation.
    """
    from vlm_unlearn.errors import UserError

    runs = [run for folder in folders for run in _evaluations(folder)]
    whole = [run.resolve() for run in runs]
    twice = next((run for run in runs if whole.count(run.resolve()) > 1), None)
    if twice is not None:
        raise UserError(f"{twice}: is given twice; name each run once")
    short = [_name(run) for run in whole]
    return dict(zip(short if len(set(short)) == len(short) else map(str, runs), runs, strict=True))


def _evaluations(folder: Path) -> list[Path]:
    """The folder itself, or of a demo's the evaluations in it."""
    inside = folder / "evaluations"
    if (folder / "suite.json").is_file() or not inside.is_dir():
        return [folder]
    found = sorted(run for run in inside.iterdir() if (run / "suite.json").is_file())
    order = _models(folder)
    return sorted(found, key=lambda run: order.index(run.name) if run.name in order else len(order)) or [folder]


def _name(run: Path) -> str:
    return next(iter(_models(run)), run.name)


def _models(folder: Path) -> list[str]:
    """The models of a folder's summary; none where there is no summary, or another's."""
    from vlm_unlearn.store import read_json

    try:
        return [str(row["model"]) for row in read_json(folder / "summary.json")["rows"]]
    except Exception:  # no summary, or another's
        return []
