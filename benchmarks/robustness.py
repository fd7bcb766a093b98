"""Prints the table of docs/methods.md on attacks: what they bring back from each method, over several seeds.

    for seed in 0 1 2; do vlm-unlearn demo --full --seed $seed --out full$seed; done
    python benchmarks/robustness.py full0/robustness full1/robustness full2/robustness

A folder contains one folder with ``robustness.json`` for each model. A cell is the lowest and the highest rate of
harmful answers of the seeds, in percent. Where an attack has several variants, the strongest counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from speed import markdown

from vlm_unlearn.records import Rate
from vlm_unlearn.robustness.results import REPORT_FILE, AttackResult, RobustnessReport
from vlm_unlearn.store import read_json

COLUMNS = {  # heading -> beginnings of the names of the attacks; taught answers and controls are left out
    "none": ("none",),
    "prefill": ("prefill/",),
    "sampling": ("sampling",),
    "5 steps": ("relearn/10/5",),
    "20 steps": ("relearn/10/20",),
    "60 steps": ("relearn/10/60",),
    "half, 20 steps": ("relearn/all/20",),
    "retain set": ("relearn/retain/",),
    "decouple set": ("relearn/decouple/",),
    "int4": ("quantize/",),
    "projector": ("restore/projector",),
    "layers 0–1": ("restore/layers_0-1",),
    "ablation": ("ablate/direction",),
}


def strongest(
    report: RobustnessReport,
    beginnings: Sequence[str],
    rate_of: Callable[[AttackResult], Rate | None] = lambda result: result.asr,
) -> float | None:
    """Returns the highest rate of an attack's variants, or None if it was not measured."""
    values = []
    for result in report.attacks:
        if not result.name.startswith(tuple(beginnings)) or result.name.endswith("/first_half"):
            continue
        rate = rate_of(result)
        if rate is not None and rate.value is not None:
            values.append(rate.value)
    return max(values, default=None)


def format_range(values: Sequence[float | None]) -> str:
    measured = [round(100 * value) for value in values if value is not None]
    if not measured:
        return "–"
    lowest, highest = min(measured), max(measured)
    return f"{lowest}" if lowest == highest else f"{lowest}–{highest}"


def table(folders: Sequence[Path]) -> str:
    """Returns the table of the models that all folders contain. The last row is the model that never knew."""
    reports = [
        {file.parent.name: RobustnessReport.model_validate(read_json(file)) for file in folder.glob(f"*/{REPORT_FILE}")}
        for folder in folders
    ]
    names = sorted(set.intersection(*(set(models) for models in reports)))
    columns = {
        heading: beginnings
        for heading, beginnings in COLUMNS.items()
        if any(strongest(models[name], beginnings) is not None for models in reports for name in names)
    }
    lines = []
    for name in names:
        cells = [format_range([strongest(models[name], starts) for models in reports]) for starts in columns.values()]
        lines.append([f"`{name.replace('_pd', '` + pd')}" if name.endswith("_pd") else f"`{name}`", *cells])

    def compared(heading: str, rate_of: Callable[[AttackResult], Rate | None]) -> list[str]:
        any_reports = [next(iter(models.values())) for models in reports]  # all have the same base and control
        ranges = [
            format_range([strongest(report, starts, rate_of) for report in any_reports]) for starts in columns.values()
        ]
        return [heading, *ranges]

    base = compared("`base`", lambda result: result.asr_base)
    never_knew = compared("never knew", lambda result: result.asr_never_knew)
    return markdown(["method", *columns], [base, *lines, never_knew])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of robustness results, one per seed")
    print(table(parser.parse_args().folders))
