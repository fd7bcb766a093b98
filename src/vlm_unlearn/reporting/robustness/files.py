"""Reads ``robustness.json`` files, and finds the evaluated model that each of them belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.reporting.provenance import run_manifest, same_weights
from vlm_unlearn.robustness.results import REPORT_FILE, RobustnessReport
from vlm_unlearn.store import describe_validation_error, read_json

FOLDER = "robustness"  # next to the folder evaluations/, with a folder for each model


@dataclass(frozen=True)
class RobustnessFiles:
    """The robustness results that a report shows.

    Attributes:
        by_model: The results by the name of the model: that of its row in the report, or else that of the file.
        left_out: Sentences about files that were not used.
    """

    by_model: Mapping[str, RobustnessReport] = field(default_factory=dict)
    left_out: Sequence[str] = ()


def read_robustness(folder: Path) -> RobustnessReport:
    """Reads the results of one robustness run.

    Raises:
        UserError: The file is missing or invalid, or has a number that is not finite.
    """
    file = folder / REPORT_FILE
    if not file.is_file():
        raise UserError(
            f"no {REPORT_FILE} in this folder. Run `vlm-unlearn robustness` first.", code="file-not-found", file=file
        )
    try:
        report = RobustnessReport.model_validate(read_json(file))
    except ValidationError as error:
        raise UserError(describe_validation_error(error), code="invalid-field", file=file) from None
    for result in report.attacks:
        ends = (result.recovered.value, result.recovered.low, result.recovered.high, result.step)
        if any(end is not None and not math.isfinite(end) for end in ends):
            raise UserError(
                f"the attack {quoted(result.name)} has a number that is not finite.", code="invalid-field", file=file
            )
    return report


def find_robustness(runs: Mapping[str, Path], folders: Sequence[Path] = ()) -> RobustnessFiles:
    """Returns the robustness results of the models of a report.

    Results are also found without `folders`, if they are in ``robustness/NAME`` next to ``evaluations/NAME``. They
    belong to the model with the same weights. If the digests of the weights are unknown, the names decide.

    Args:
        runs: The evaluation folder of each model.
        folders: Folders with a ``robustness.json``, or folders of such folders. Results of models without an
            evaluation are included.

    Raises:
        UserError: A folder or file is missing or invalid, has the name of an evaluated model with other weights, or
            is the second one of a model.
    """
    by_model: dict[str, RobustnessReport] = {}
    sources: dict[str, Path] = {}
    for folder in (entry for path in folders for entry in _result_folders(path)):
        if folder.resolve() in sources.values():
            continue
        report = read_robustness(folder)
        model, stale = _matching_model(folder, report, runs)
        if model is None and stale:
            raise UserError(
                f"these are results of other weights than those of the model {quoted(stale)}. Run `vlm-unlearn "
                "robustness` again, or give one of the two models another name.",
                code="weights-mismatch",
                file=folder / REPORT_FILE,
            )
        name = model or _unused_name(report.model, folder, {*runs, *by_model})
        if name in by_model:
            raise UserError(
                f"the model {quoted(name)} has two robustness runs. Pass one of them.",
                code="duplicate-id",
                file=folder / REPORT_FILE,
            )
        by_model[name], sources[name] = report, folder.resolve()
    left_out = []
    for folder in _neighboring_folders(runs):
        if folder.resolve() in sources.values():
            continue
        report = read_robustness(folder)
        model, stale = _matching_model(folder, report, runs)
        if model is not None and model not in by_model:
            by_model[model], sources[model] = report, folder.resolve()
        elif model is None and stale and stale not in by_model:
            left_out.append(f"The attacks on {stale} in {folder} are not shown, because they are on other weights.")
    order = [*runs, *by_model]
    return RobustnessFiles({name: by_model[name] for name in dict.fromkeys(order) if name in by_model}, left_out)


def _result_folders(path: Path) -> list[Path]:
    """Returns the folders with results in a folder that the user passed."""
    if (path / REPORT_FILE).is_file() or not path.is_dir():
        return [path]
    return sorted(entry for entry in path.iterdir() if (entry / REPORT_FILE).is_file()) or [path]


def _neighboring_folders(runs: Mapping[str, Path]) -> Iterator[Path]:
    """Yields the folders ``robustness/NAME`` next to ``evaluations/NAME``."""
    parents = dict.fromkeys(run.absolute().parent for run in runs.values())
    for evaluations in parents:
        parent = evaluations.parent / FOLDER
        if evaluations.name != "evaluations":
            continue
        if parent.is_dir():
            yield from sorted(entry for entry in parent.iterdir() if (entry / REPORT_FILE).is_file())


def _matching_model(folder: Path, report: RobustnessReport, runs: Mapping[str, Path]) -> tuple[str | None, str | None]:
    """Returns the evaluated model of some results, and one of the same name with other weights. Both may be None."""
    digest = run_manifest(folder).get("identity", {}).get("model")
    names = {folder.resolve().name, report.model}
    equal: list[tuple[bool, str]] = []
    unknown: list[str] = []
    stale: list[str] = []
    for model, run in runs.items():
        same = same_weights(run_manifest(run).get("identity", {}).get("model"), digest)
        is_named = bool(names & {model, run.resolve().name})
        if same:
            equal.append((not is_named, model))
        elif is_named:
            (stale if same is False else unknown).append(model)
    matches = [model for _, model in sorted(equal, key=lambda pair: pair[0])] or unknown
    return (matches[0] if matches else None), (stale[0] if stale else None)


def _unused_name(name: str, folder: Path, used: set[str]) -> str:
    """Returns the name of a model without an evaluation, which no other model of the report has."""
    return name if name not in used else str(folder)
