"""The table in the terminal says whatever a summary holds."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vlm_unlearn.cli.common import RatesTable, result_console
from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Batching, Comparison, Rate, Row, Summary


def share(hits: int, n: int, failed: int = 0) -> Rate:
    return rate([i < hits for i in range(n)], [str(i) for i in range(n)], failed)


def printed(summary: Summary) -> list[str]:
    console = Console(file=io.StringIO(), width=150)
    console.print(RatesTable(summary))
    return [line.strip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_changes_failures_published_counting_and_batching() -> None:
    change = Comparison(
        model="[bold]npo",
        base="base",
        metric="asr",
        difference=-0.5,
        low=-0.7,
        high=-0.3,
        p=0.001,
        p_adjusted=0.001,
        test="mcnemar",
        n=40,
    )
    npo = Row(
        model="[bold]npo",
        metrics={"asr": share(0, 40, failed=3)},
        paper={"asr": share(10, 43)},
        batching=Batching(checked=20, flipped=1),
    )
    lines = printed(Summary(rows=[Row(model="base", metrics={"asr": share(20, 40)}), npo], comparisons=[change]))
    assert [line.split() for line in lines[2:9]] == [
        ["base", "50.0", "%"],
        ["35.2,", "64.8"],
        ["[bold]npo", "0.0", "%"],
        ["at", "most", "7.2"],
        ["-50.0", "*"],
        ["published", "23.3", "%"],
        ["3", "failed"],
    ]
    notes = " ".join(lines[9:])
    assert "[bold]npo" in notes
    assert "0 of 40 groups: at most 7.2\u00a0% with 95\u00a0% confidence" in notes
    assert "over 1 comparison (adjusted p < 0.05)" in notes
    assert "1 of 20 answers" in notes


def test_one_models_metrics_stand_below_each_other() -> None:
    row = Row(
        model="[bold]m",
        metrics={"asr": share(20, 40), "my own": share(3, 4, failed=2)},
        paper={"asr": share(10, 40), "other": share(1, 4)},
    )
    lines = [" ".join(line.split()) for line in printed(Summary(rows=[row]))]
    assert lines[0] == "[bold]m rate 95 % interval n failed published"
    assert lines[2:5] == ["ASR 50.0 % 35.2, 64.8 40 0 25.0 %", "my own 75.0 % 30.1, 95.4 4 2", "other – 25.0 %"]


def test_a_bare_row_needs_no_notes() -> None:
    assert len(printed(Summary(rows=[Row(model="base", metrics={"asr": share(20, 40)})]))) == 3  # heading, rule, metric


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("200", 200), ("", 150), ("0", 150), ("wide", 150)])
def test_on_a_pipe_the_table_is_as_wide_as_columns_says(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert result_console().width == width
