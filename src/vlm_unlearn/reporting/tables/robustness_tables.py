"""Tables of robustness runs: all attacks, the worst attack on each model, and the steps of relearning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_unlearn.records import Rate
from vlm_unlearn.reporting.formatting import interval
from vlm_unlearn.reporting.robustness.formatting import recovered_interval
from vlm_unlearn.reporting.robustness.ranking import AttackedModel
from vlm_unlearn.reporting.robustness.text import control_note, last_steps, step_text
from vlm_unlearn.reporting.tables.table import Cell, Column, Table, Value, table_lines, text_columns
from vlm_unlearn.robustness.results import AttackResult, Recovery

RATES: Mapping[str, str] = {"asr": "ASR", "asr_base": "base", "asr_never_knew": "never knew"}


def robustness_tables(models: Sequence[AttackedModel]) -> list[Table]:
    """Returns the tables that robustness runs have data for.

    Args:
        models: The models, the worst case first, as `rank_models` returns them.
    """
    return [table for table in (_worst_attacks(models), _all_attacks(models), _steps(models)) if table.lines]


def _columns(*keys: str) -> list[Column]:
    rates = [Column(key, title) for key, title in RATES.items()]
    numbers = [Column("recovered", "recovered"), Column("n", "n"), Column("failed", "failed")]
    return [*text_columns(*keys), *rates, *numbers]


def _worst_attacks(models: Sequence[AttackedModel]) -> Table:
    columns = _columns("model", "attack")
    lines = [[model.name, *_line(model.worst)] for model in models if model.worst is not None]
    title = "The attack that brings most back from each model, in %."
    return Table("worst_attacks", title, columns, table_lines(columns, lines), notes=_notes(models))


def _all_attacks(models: Sequence[AttackedModel]) -> Table:
    columns = _columns("model", "attack")
    lines = []
    for model in models:
        unattacked = [model.unattacked] if model.unattacked is not None else []
        lines += [[model.name, *_line(result)] for result in (*model.ranked, *unattacked)]
    title = "Harmful answers under each attack, in %."
    return Table("robustness", title, columns, table_lines(columns, lines), notes=_notes(models))


def _notes(models: Sequence[AttackedModel]) -> list[str]:
    notes = ["ASR, base and never knew: share of harmful answers after the same attack.", control_note(models)]
    if any(result.is_score for model in models for result in model.ranked):
        notes.append("Rows of probes have mean scores instead of shares.")
    return notes


def _line(result: AttackResult) -> list[Value]:
    return [
        result.name,
        *(_rate(key, getattr(result, key)) for key in RATES),
        _recovered(result.recovered),
        Cell(f"{result.asr.n:,}", {"n": result.asr.n}),
        Cell(f"{result.asr.failed:,}", {"failed": result.asr.failed}),
    ]


def _rate(key: str, rate: Rate | None) -> Cell | None:
    if rate is None or rate.value is None:
        return None
    values = {key: rate.value, f"{key}_low": rate.low, f"{key}_high": rate.high}
    return Cell(f"{100 * rate.value:.1f}", values, interval(rate))


def _recovered(recovery: Recovery) -> Cell | None:
    if recovery.value is None:
        return None
    values = {"recovered": recovery.value, "recovered_low": recovery.low, "recovered_high": recovery.high}
    return Cell(f"{100 * recovery.value:.0f}", values, recovered_interval(recovery))


def _steps(models: Sequence[AttackedModel]) -> Table:
    columns = [
        *text_columns("model", "curve"),
        *(Column(key, title) for key, title in (("steps", "model's steps"), ("base", "base"))),
        Column("never_knew", "never knew"),
    ]
    lines: list[list[Value]] = []
    for model in models:
        last = last_steps(model)
        for steps in model.report.steps_to_half:
            values = {"steps": steps.model, "base": steps.base, "never_knew": steps.never_knew}
            if model.report.never_knew is None:
                del values["never_knew"]
            cells: list[Value] = [
                Cell(step_text(value, last.get(steps.curve)), {key: value}) for key, value in values.items()
            ]
            lines.append([model.name, steps.curve, *cells, *[None] * (3 - len(cells))])
    title = "Steps of further training until half of the base's harmful answers are back."
    notes = ["A number after > is the last measured step, at which fewer were back."] if lines else []
    return Table("steps_to_half", title, columns, table_lines(columns, lines), notes=notes)
