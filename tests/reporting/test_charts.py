"""Charts: their content, the drawings, and names that must not act as formulas or markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
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
    Series,
    display_name,
    hover_texts,
    style_of,
)
from vlm_unlearn.reporting.charts.curves import loss_charts, write_loss_png
from vlm_unlearn.reporting.charts.inline_svg import inline_svg
from vlm_unlearn.reporting.charts.matplotlib_charts import SETTINGS, delete_stale_plots, draw_chart, write_plots
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


@pytest.mark.multiprocess
def test_several_processes_draw_the_same_files(tmp_path: Path) -> None:
    charts = dict(list(charts_of([row("m"), row("$x$")]).items())[:3])
    counts: list[tuple[str, int, int]] = []
    files = write_plots(tmp_path / "several", charts, lambda *count: counts.append(count), processes=2)
    expected = write_plots(tmp_path / "single", charts)
    assert [file.name for file in files] == [file.name for file in expected]
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in expected]
    assert counts == [("plots", done, 3) for done in (1, 2, 3)]


def page_svg(folder: Path, name: str, chart: Chart) -> tuple[str, ElementTree.Element]:
    """Returns a chart as the page contains it, as text and parsed."""
    (file,) = [file for file in write_plots(folder, {name: chart}) if file.suffix == ".svg"]
    text = str(inline_svg(file.read_text(encoding="utf-8"), name, chart))
    return text, ElementTree.fromstring(text)


def test_inline_svg_escapes_names(tmp_path: Path) -> None:
    text, root = page_svg(tmp_path, "attack-asr", charts_of([row(name) for name in NAMES])["attack-asr"])
    labels = {"".join(node.itertext()) for node in root.iter("text")}
    assert labels > {"$x^2$", "<script>", "a & b", "nul \\x00 \\ud800 \\u202e"}
    assert "<script" not in text
    assert text.isprintable()
    assert len(display_name("x" * 500)) <= 40


def test_inline_svg_has_page_colors_unique_ids_and_a_description(tmp_path: Path) -> None:
    chart = charts_of([row("a")])["labels-1"]
    text, root = page_svg(tmp_path, "labels-1", chart)
    assert "#000000" not in text
    assert "var(--text)" in text
    assert not {node.tag for node in root.iter()} & {"style", "script", "metadata", "image", "foreignObject"}
    ids = [node.get("id", "") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', text))
    assert references
    assert references <= set(ids)
    assert all(name.startswith("labels-1-") for name in ids)
    assert chart.title in root.get("aria-label", "")
    assert root.get("role") == "img"
    assert root.find("desc") is not None
    assert chart.title not in {"".join(node.itertext()) for node in root.iter("text")}  # the figure's caption has it
    assert "http" not in text


def test_inline_svg_shows_numbers_under_the_mouse(tmp_path: Path) -> None:
    charts = charts_of([row("a", 4), row("b", 9)])
    for name in ("attack-asr", "tradeoff-refusals"):
        _, root = page_svg(tmp_path, name, charts[name])
        assert [node.text for node in root.iter("title")] == hover_texts(charts[name])
    low, high = 100 * share(4).low, 100 * share(4).high
    assert hover_texts(charts["attack-asr"])[0] == f"a, original wording: 10.0 % [{low:.1f}, {high:.1f}]"
    assert hover_texts(charts["tradeoff-refusals"])[1].startswith("b, attacked ASR: 25.0 % [")
    missing = Bars("t", ["a"], [Series("s", [None], [None], [None], style_of(0))])
    assert hover_texts(missing) == ["a, s: not measured"]
    assert hover_texts(Heatmap("t", ["a"], ["b"], [[1.0]])) == []


def drawn_height(chart: Chart) -> float:
    """Returns the height of a drawing in inches."""
    with matplotlib.rc_context(dict(SETTINGS)):
        return float(draw_chart(chart).get_figheight())


def test_bars_of_many_models_stay_readable() -> None:
    """With 25 models the bars are as thick as with 2, and the categories become a heatmap."""
    kinds = {"A": share(3), "B": share(5)}
    few, many = (
        charts_of([row(f"m{i}", i % 20, categories={"asr": kinds}) for i in range(count)]) for count in (2, 25)
    )
    more = drawn_height(many["attack-asr"]) - drawn_height(few["attack-asr"])
    assert more == pytest.approx(23 * (2 * 0.17 + 0.13))
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
    assert max(len(text) for chart in charts.values() for text in hover_texts(chart)) < 200


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
    assert chart.points[0].y == pytest.approx((15, 100 * share(6).low, 100 * share(6).high))
    with matplotlib.rc_context(dict(SETTINGS)):
        axes = draw_chart(chart).axes[0]
    across, up = (bars.get_segments()[0] for bars in axes.containers[0].lines[2])
    assert across[:, 0] == pytest.approx((100 * low, 100 * high))
    assert up[:, 1] == pytest.approx((100 * share(6).low, 100 * share(6).high))
    assert (chart.ideal, charts_of([row("a")])["tradeoff-use"].ideal) == ((0, 0), (0, 100))


def test_scatter_draws_overlapping_points_in_decreasing_size() -> None:
    positions = [("a", 0, 0), ("b", 0.5, 0.5), ("c", 50, 50)]
    points = [Point(name, (x, x, x), (y, y, y), style_of(0)) for name, x, y in positions]
    with matplotlib.rc_context(dict(SETTINGS)):
        axes = draw_chart(Scatter("t", points, "x", "y", (0, 0))).axes[0]
    sizes = [container.lines[0].get_markersize() for container in axes.containers]
    assert sizes[0] == sizes[2] > sizes[1] > 0
    assert axes.get_legend_handles_labels()[1] == ["a", "b", "c"]


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
    svg = next(file for file in write_plots(tmp_path, {name: chart}) if file.suffix == ".svg")
    assert chart.series[0].name in {"".join(node.itertext()) for node in ElementTree.parse(svg).iter()}
