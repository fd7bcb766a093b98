"""Charts: their content, both renderers, and names that must not act as formulas or markup."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from vlm_unlearn.config import Suite, load
from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Rate, Row, Summary
from vlm_unlearn.reporting.charts.chart import (
    COLORS,
    Bars,
    Chart,
    Heatmap,
    Lines,
    Point,
    Scatter,
    display_name,
    place_labels,
    style_of,
)
from vlm_unlearn.reporting.charts.curves import loss_charts, write_loss_png
from vlm_unlearn.reporting.charts.matplotlib_charts import delete_stale_plots, write_plots
from vlm_unlearn.reporting.charts.plotly_charts import plotly_figure
from vlm_unlearn.reporting.charts.summary_charts import summary_charts
from vlm_unlearn.reporting.metric_roles import MetricRoles, answers_link, assign_roles

NAMES = ["$x^2$", "<script>", "a & b", "nul \x00 \ud800 \u202e", "very_long_" * 20]


def share(hits: int, n: int = 40) -> Rate:
    return rate([i < hits for i in range(n)], [str(i) for i in range(n)])


def row(name: str, number: int = 0, **fields: object) -> Row:
    metrics = {
        metric: share(number + index)
        for index, metric in enumerate(("asr", "asr_attacked", "refusal_rate_attacked", "utility"))
    }
    return Row(model=name, metrics=metrics, labels={"unsafe": {"complied": 3, "refused": 1, "failed": 1}}, **fields)


def charts_of(rows: list[Row], roles: MetricRoles | None = None) -> dict[str, Chart]:
    sections = summary_charts(Summary(rows=rows), roles or assign_roles(rows, {}))
    return {name: chart for section in sections.values() for name, chart in section.items()}


def test_loss_charts_skip_invalid_lines_and_numbers(tmp_path: Path) -> None:
    lines = [
        b'{"step": 1, "loss": 2.0, "forget": 1.5, "note": "text"}',
        b"",
        b"7",
        b'"text"',
        b'{"loss": 9.0}',
        b'{"step": "two", "loss": 9.0}',
        b'{"step": true, "loss": 9.0}',
        b'{"step": NaN, "loss": 9.0}',
        b'{"step": 2, "loss": NaN, "forget": 1.0}',
        b'{"step": 3, "loss": 1e308, "forget": ' + b"9" * 400 + b"}",
        b'{"step": 4, "loss": -1e308, "forget": ' + b"9" * 9000 + b"}",
        b'{"step": 5, "loss": 9.0, "\xff": 1}',
        b'{"step": 6, "loss": 1.0, "forget": Infinity}',
        b"[" * 100_000,
        b'{"step": 7, "lo',
    ]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    charts = loss_charts({"npo": tmp_path}, ["npo"])
    points = [
        [(list(series.x), list(series.values)) for series in chart.series]
        for chart in charts.values()
        if isinstance(chart, Lines)
    ]
    assert points == [[([1, 6], [2.0, 1.0])], [([1, 2], [1.5, 1.0])]]
    assert len(write_plots(tmp_path / "plots", charts)) == 6
    assert write_loss_png(tmp_path) == tmp_path / "loss.png"


@pytest.mark.slow
def test_write_plots_draws_every_chart_in_every_format(tmp_path: Path) -> None:
    kinds = {"A": share(3), "B": share(5)}
    rows = [
        row(name, number, categories={"asr": kinds}, rewrites={"asr": [share(1), share(2)]})
        for number, name in enumerate(NAMES)
    ]
    charts = charts_of(rows)
    files = write_plots(tmp_path, charts)
    assert len(files) == 3 * len(charts)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in files}
    texts = {
        "".join(node.itertext()) for file in files if file.suffix == ".svg" for node in ElementTree.parse(file).iter()
    }
    for name in ("$x^2$", "<script>", "a & b", "nul \\x00 \\ud800 \\u202e"):
        assert name in texts
    assert all(
        file.read_bytes().startswith(b"%PDF") and b"/Type3" not in file.read_bytes()
        for file in files
        if file.suffix == ".pdf"
    )
    for file in (tmp_path / "labels-99.svg", tmp_path / ".labels-99.part.png"):
        file.write_text("of an earlier report, and of a killed process")
    user_files = {tmp_path / "kept.txt", tmp_path / "mine.pdf"}
    for file in user_files:
        file.write_text("of the user")
    delete_stale_plots(tmp_path, files)
    assert set(tmp_path.iterdir()) == {*files, *user_files}
    delete_stale_plots(tmp_path, [])
    assert set(tmp_path.iterdir()) == user_files


def test_write_plots_twice_gives_equal_files_and_keeps_stale_ones(tmp_path: Path) -> None:
    stale = tmp_path / "labels-99.svg"
    stale.write_text("of an earlier report")
    chart = {"labels-1": charts_of([row("m")])["labels-1"]}
    contents = {file: file.read_bytes() for file in write_plots(tmp_path, chart)}
    assert {file: file.read_bytes() for file in write_plots(tmp_path, chart)} == contents
    assert stale.exists()  # the earlier page links to it until the new page is written


def test_plotly_figure_escapes_names() -> None:
    figure = plotly_figure(charts_of([row(name) for name in NAMES])["attack-asr"])
    assert figure["layout"]["yaxis"]["ticktext"][:4] == [
        "&#36;x^2&#36;",
        "&lt;script&gt;",
        "a &amp; b",
        "nul \\x00 \\ud800 \\u202e",
    ]
    assert len(display_name("x" * 500)) <= 40


def test_plotly_figure_of_many_models_stays_readable() -> None:
    """With 25 models the bars are as thick as with 2, and the categories become a heatmap."""
    kinds = {"A": share(3), "B": share(5)}
    few, many = (
        charts_of([row(f"m{i}", i % 20, categories={"asr": kinds}) for i in range(count)]) for count in (2, 25)
    )
    heights = {
        len(chart.names): plotly_figure(chart)["layout"]["height"] for chart in (few["attack-asr"], many["attack-asr"])
    }
    assert heights[25] - heights[2] == 23 * (2 * 15 + 12)
    assert type(few["categories-1"]).__name__ == "Bars"
    assert type(many["categories-1"]).__name__ == "Heatmap"
    styles = [(style.color, style.shape) for style in map(style_of, range(49))]
    assert len(set(styles)) == 49


@pytest.mark.parametrize("models", [2, 25])
def test_category_charts_show_the_largest_categories(models: int) -> None:
    kinds = {f"c{number:04}": share(1, 10 + number % 7) for number in range(1500)} | {"zz": share(1, 99)}
    chart = charts_of([row(f"m{i}", categories={"asr": kinds}) for i in range(models)])["categories-1"]
    assert isinstance(chart, Bars | Heatmap)
    names = chart.names if isinstance(chart, Bars) else chart.columns
    assert chart.title == "ASR by category, the largest 40 (1,461 more in the table)"
    assert list(names) == [*(f"c{number:04}" for number in range(6, 6 + 39 * 7, 7)), "zz"]


ODD_NAMES = ["", "\x01\x1b[31m", "\ud800", "\u202eevil", "long " * 200_000, "$x$ $"]


def charts_with_name(name: str) -> dict[str, Chart]:
    """Returns the charts of a model with a metric and a split of that name."""
    rates = {"asr": share(1), name: share(2)}
    fields = {"categories": {name: {"A": share(1), "B": share(2)}}, "rewrites": {name: [share(1), share(2)]}}
    return charts_of([Row(model="m", metrics=rates, labels={name: {"complied": 1}}, **fields)])


@pytest.mark.parametrize("name", ODD_NAMES)
def test_charts_have_any_metric_and_split_name(name: str) -> None:
    charts = charts_with_name(name)
    assert {"categories-1", "shots-1", "labels-1"} <= set(charts)
    assert all(0 < len(chart.title) <= 90 and chart.title.isprintable() for chart in charts.values())
    assert max(len(plotly_figure(chart)["layout"]["xaxis"]["title"]["text"]) for chart in charts.values()) < 100


@pytest.mark.parametrize(
    "name", [name if name in ("\ud800", "$x$ $") else pytest.param(name, marks=pytest.mark.slow) for name in ODD_NAMES]
)
def test_write_plots_draws_any_metric_and_split_name(tmp_path: Path, name: str) -> None:
    for file in write_plots(tmp_path, charts_with_name(name)):
        if file.suffix == ".svg":
            ElementTree.parse(file)


def test_tradeoff_chart_has_two_intervals_and_an_ideal_corner() -> None:
    chart = charts_of([row("a", 4)])["tradeoff-refusals"]
    assert isinstance(chart, Scatter)
    low, high = share(5).low, share(5).high
    assert chart.points[0].x == pytest.approx((12.5, 100 * low, 100 * high))
    trace = plotly_figure(chart)["data"][0]
    assert trace["error_x"]["array"][0] == pytest.approx(100 * high - 12.5)
    assert trace["error_y"]["arrayminus"][0] == pytest.approx(15 - 100 * share(6).low)
    assert (chart.ideal, charts_of([row("a")])["tradeoff-use"].ideal) == ((0, 0), (0, 100))


def test_place_labels_do_not_overlap() -> None:
    positions = [("a", 0, 0), ("b", 1, 1), ("c", 0, 50), ("d", 2, 44), ("e", 100, 0), ("f", 99, 88)]
    points = [Point(name, (x, x, x), (y, y, y), style_of(0)) for name, x, y in positions]
    labels = place_labels(Scatter("t", points, "x", "y", (0, 0)))
    assert [label.text for label in labels] == ["a, b", "c", "d", "e", "f"]
    centers = [(label.x * 2.5 + label.dx, label.y * 2.1 + label.dy) for label in labels]
    assert all(abs(a[0] - b[0]) > 10 or abs(a[1] - b[1]) >= 14 for i, a in enumerate(centers) for b in centers[:i])
    assert all(0 < x < 265 for x, _ in centers)
    crowd = Scatter("t", [Point(str(i), (i, i, i), (i, i, i), style_of(i)) for i in range(25)], "x", "y", (0, 0))
    assert place_labels(crowd) == []


def test_label_chart_counts_every_answer() -> None:
    chart = charts_of([row("a")])["labels-1"]
    assert isinstance(chart, Bars)
    assert {series.name: series.values for series in chart.series} == {
        "complied": [60.0],
        "refused": [20.0],
        "failed": [20.0],
    }
    assert len({(series.style.color, series.style.hatch) for series in chart.series}) == 3


def test_summary_charts_without_an_attack_have_no_attack_chart() -> None:
    charts = charts_of([Row(model="m", metrics={"asr": share(1), "sarr": share(2)})])
    assert not [name for name in charts if name.startswith("attack")]
    assert "rates-sarr" in charts
    assert charts_of([Row(model="m", metrics={"gqa": share(1), "specificity": share(2)})]).keys() == {"benchmarks"}
    assert len(set(COLORS)) == 7


def test_assign_roles_of_metrics_that_only_a_suite_defines(tmp_path: Path) -> None:
    """The role follows from what a metric counts, not from its name."""
    metrics = {
        "leaks": {"splits": ["bad"], "labels": ["complied"]},
        "prudish": {"splits": ["good"], "labels": ["refused"]},
        "helps": {"splits": ["good"], "labels": ["complied"]},
        "all": {"splits": ["bad", "good"], "labels": ["degenerate"]},
    }
    kinds = (("bad", "unsafe"), ("good", "safe"))
    splits = [
        {"name": name, "format": "vlguard", "file": "f.json", "images": ".", "kind": kind} for name, kind in kinds
    ]
    (tmp_path / "suite.yaml").write_text(str({"splits": splits, "metrics": metrics}))
    suite = load(Suite, tmp_path / "suite.yaml", ["model=m"])
    rows = [Row(model="m", metrics={name: share(3) for name in metrics})]
    roles = assign_roles(rows, {"m": suite})
    assert (roles.harm, roles.over_refusal, roles.utility, roles.attacked) == ("leaks", "prudish", "helps", False)
    assert answers_link("m", "leaks", suite) == [("model", "m"), ("label", "complied"), ("case", "bad")]
    assert answers_link("m", "all", suite) == [
        ("model", "m"),
        ("label", "degenerate"),
        ("case", "bad"),
        ("case", "good"),
    ]
    assert answers_link("m", "asr", suite) == []
    assert assign_roles([Row(model="m", metrics={"leaks": share(3), "asr": share(2)})], {"m": suite}).harm == "asr"


def test_label_chart_with_one_label_has_a_legend(tmp_path: Path) -> None:
    refused = Row(model="m", metrics={"asr": share(0)}, labels={"unsafe": {"refused": 4}})
    name, chart = next(
        (name, chart) for name, chart in charts_of([refused]).items() if isinstance(chart, Bars) and chart.stacked
    )
    assert len(chart.series) == 1
    assert plotly_figure(chart)["layout"]["showlegend"]
    svg = next(file for file in write_plots(tmp_path, {name: chart}) if file.suffix == ".svg")
    assert chart.series[0].name in {"".join(node.itertext()) for node in ElementTree.parse(svg).iter()}
