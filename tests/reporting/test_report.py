"""The report escapes all texts, and its notes and marks follow from the numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from browser import open_page, wait_until
from finished_runs import plot_formats
from vlm_unlearn.config import Suite, load
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Batching, Comparison, Rate, Response, Row, Summary, Verdict
from vlm_unlearn.reporting.charts.chart import Lines
from vlm_unlearn.reporting.charts.summary_charts import rewrite_charts
from vlm_unlearn.reporting.formatting import bounds, change, notes, rule_of_three_note
from vlm_unlearn.reporting.report import write_report
from vlm_unlearn.store import write_json, write_records
from vlm_unlearn.worlds.tiny.findings import demo_findings

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "javascript:window.hacked=1",
    "\u202egnisrever",
    "{{ 7 * 7 }}",
    "lone \ud800 surrogate and \x00 nul",
    "long " * 200_000,
]
METRICS = (
    "asr",
    "asr_attacked",
    "refusal_rate",
    "refusal_rate_attacked",
    "sarr",
    "degenerate_rate",
    "utility",
    "utility_attacked",
)


def row(name: str, **shares: float) -> Row:
    """A row with n = 100, these shares, and zero for all other metrics."""
    metrics = {
        metric: rate([i < 100 * shares.get(metric, 0) for i in range(100)], [str(i) for i in range(100)])
        for metric in METRICS
    }
    labels = {"unsafe_what": {"complied": 1, "refused": 1, "degenerate": 1, "off_topic": 1, "failed": 2}}
    return Row(model=name, metrics=metrics, labels=labels, failed={"tiny_world": {"unsafe_what": 2}})


def share(hits: int, n: int) -> Rate:
    return rate([i < hits for i in range(n)], [str(i) for i in range(n)])


def comparison(model: str, metric: str, difference: float, p_adjusted: float) -> Comparison:
    ends = {"low": difference - 0.1, "high": difference + 0.1}
    return Comparison(
        model=model,
        base="base",
        metric=metric,
        difference=difference,
        p=p_adjusted,
        p_adjusted=p_adjusted,
        test="mcnemar",
        n=90,
        **ends,
    )


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs with hostile answers, by models with hostile names."""
    suite = load(Suite, Path("suites/tiny"), ["model=m", f"root={world}"])
    prompts = suite_prompts(suite)
    names = ["base", "<script>window.hacked = 1</script>"]
    runs = {}
    parent = tmp_path_factory.mktemp("runs")
    for name in names:
        folder = parent / re.sub(r"\W", "", name)
        write_json(folder / "suite.json", suite.model_dump(mode="json"))
        write_records(folder / "prompts.jsonl", prompts)
        texts = [HOSTILE[i % len(HOSTILE)] for i in range(len(prompts))]
        write_records(
            folder / "responses.jsonl", [Response(prompt_id=p.id, text=t) for p, t in zip(prompts, texts, strict=True)]
        )
        write_records(
            folder / "verdicts-tiny_world.jsonl",
            [Verdict(prompt_id=p.id, judge="tiny_world", label="refused") for p in prompts],
        )
        runs[name] = folder
    return runs


@pytest.fixture(scope="module")
def report(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with plot_formats("svg"):  # the only format that the page shows itself
        return write_report(
            tmp_path_factory.mktemp("report"),
            Summary(rows=[row(name, asr=0.5) for name in runs]),
            runs,
            "Report {{ 7 * 7 }} \u202e</title><script>window.hacked = 1</script>",
        )


@pytest.fixture(scope="module")
def comparison_report(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every field of rows and comparisons, and with hostile names of models and metrics."""
    base, hostile = runs
    script = "<script>window.hacked = 1</script>"
    rows = [
        row(base, asr=0.5).model_copy(update={"rewrites": {script: [share(10, 40), share(20, 40)]}}),
        row(hostile, asr=0.2).model_copy(
            update={
                "rewrites": {script: [share(0, 40), share(2, 40)], "asr_attacked": [share(1, 40), share(3, 40)]},
                "paper": {"asr": share(37, 80), "refusal_rate": share(0, 100), script: share(1, 3)},
                "batching": Batching(checked=200, flipped=3),
            }
        ),
    ]
    comparisons = [
        comparison(hostile, "asr", -0.3, 0.001),
        comparison(hostile, "sarr", 0.05, 0.2),
        comparison(hostile, script, 0.5, 0.01),
    ]
    summary = Summary(rows=rows, comparisons=comparisons)
    with plot_formats("svg"):
        return write_report(tmp_path_factory.mktemp("comparison"), summary, runs, "Comparison")


@pytest.mark.parametrize(("p", "expected"), [(0.2, "None of the 2 changes is "), (0.001, "1 of 2 changes is ")])
def test_report_counts_significant_changes(p: float, expected: str, tmp_path: Path) -> None:
    comparisons = [comparison("npo", "asr", 0.1, p), comparison("npo", "sarr", 0.1, 0.2)]
    summary = Summary(rows=[row("base", asr=0.5), row("npo", asr=0.6)], comparisons=comparisons)
    with plot_formats():
        assert expected in write_report(tmp_path, summary, {}, "Comparison").read_text(encoding="utf-8")


def test_report_hostile_text_is_not_markup(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert "<script>window.hacked" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;window.hacked" in page
    assert "<h1><bdi>Report {{ 7 * 7 }} \\u202e&lt;/title&gt;" in page
    assert "Content-Security-Policy" in page
    assert re.search(r"https?://", page.split("<script>")[0]) is None


def test_report_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    name = "\u202eevil \u2067\ud800\x00"
    rows = [row(model, asr=0.5) for model in ("base", name)]
    rows[1] = rows[1].model_copy(
        update={"labels": {name: {"complied": 1}}, "judge": name, "metrics": {**rows[1].metrics, name: share(1, 9)}}
    )
    changes = [
        comparison(name, "asr", -0.3, 0.001),
        comparison(name, name, -0.3, 0.001).model_copy(update={"base": name}),
    ]
    with plot_formats():
        file = write_report(tmp_path, Summary(rows=rows, comparisons=changes), {}, name, left_out=[name])
    text = file.read_text(encoding="utf-8").split("<script")[0]
    assert not set(text) & set("\u202e\u2067\ufffd\x00")
    assert "<b>\\u202eevil \\u2067\\ud800\\x00</b>" in text


def test_report_counts_failures(report: Path) -> None:
    assert "4 answers or verdicts failed" in report.read_text(encoding="utf-8")


def test_report_marks_significant_changes(comparison_report: Path) -> None:
    page = comparison_report.read_text(encoding="utf-8")
    assert ">-30.0 *</small>" in page
    assert ">+5.0</small>" in page
    assert "over 3 comparisons (adjusted p &lt; 0.05)" in page
    assert "0.001, significant" in page
    assert "0.2, significant" not in page
    assert "<script>window.hacked" not in page


def test_report_shows_published_counting_and_effect_of_batching(comparison_report: Path) -> None:
    page = comparison_report.read_text(encoding="utf-8")
    assert page.count("<small>published ") == 1  # the only metric with different values
    assert "published 46.2\u00a0%" in page or "published 46.3\u00a0%" in page
    assert "3 of 200 answers" in page


def test_bounds_of_zero_and_all_use_the_rule_of_three() -> None:
    """(1 - p)^40 = 0.05 for p = 7.2 %."""
    assert bounds(share(0, 40)) == "at most 7.2"
    assert bounds(share(40, 40)) == "at least 92.8"
    assert rule_of_three_note(share(0, 40)) == "0 of 40 groups: at most 7.2\u00a0% with 95\u00a0% confidence"
    assert rule_of_three_note(share(40, 40)) == "40 of 40 groups: at least 92.8\u00a0% with 95\u00a0% confidence"
    assert (bounds(share(20, 40)), rule_of_three_note(share(20, 40)), rule_of_three_note(None)) == (
        "[35.2, 64.8]",
        "",
        "",
    )
    assert change(comparison("m", "asr", -0.875, 0.049)) == "-87.5 *"
    assert change(comparison("m", "asr", -0.875, 0.05)) == "-87.5"
    assert notes(Summary(rows=[Row(model="m", metrics={"asr": share(20, 40)})]), ["asr"]) == []


def test_rewrite_curves_have_one_line_per_model() -> None:
    rows = [
        Row(model="a", metrics={}, rewrites={"asr": [share(1, 4), share(2, 4)]}),
        Row(model="b", metrics={}),
        Row(model="c", metrics={}, rewrites={"asr": [rate([], []), share(3, 4)]}),
    ]
    chart = rewrite_charts(rows)["shots-1"]
    assert isinstance(chart, Lines)
    first, second = chart.series
    assert (first.name, first.x, first.values) == ("a", [1, 2], [25.0, 50.0])
    assert (second.name, second.x, second.values) == ("c", [2], [75.0])
    assert rewrite_charts([Row(model="b", metrics={})]) == {}
    assert first.style.shape != second.style.shape
    low, high = share(1, 4).low, share(1, 4).high
    assert (first.low[0], first.high[0]) == pytest.approx((100 * low, 100 * high))


def test_demo_findings_follow_from_the_rates() -> None:
    rows = [
        row("mixed_sft", asr_attacked=0.9, refusal_rate_attacked=0.8),
        row("npo", utility_attacked=0.4),
        row("po", sarr=1.0),
        row("po+pd", sarr=0.1),
    ]
    mirage, decoupling = demo_findings(rows)
    assert " is a mirage." in mirage
    assert "90.0\u00a0%" in mirage
    assert "only 40.0\u00a0% of the harmless ones" in mirage
    assert "removes most" in decoupling
    negative, worse = demo_findings([row("mixed_sft"), row("npo"), row("po", sarr=0.2), row("po+pd", sarr=0.3)])
    assert " is not a mirage here." in negative
    assert "does not reduce" in worse
    assert demo_findings([row("base")]) == []
    (useful,) = demo_findings([row("mixed_sft"), row("npo", utility_attacked=1.0)])
    assert "only" not in useful


def test_demo_findings_without_a_rate_are_left_out() -> None:
    """A rate whose verdicts all failed is not a rate of 0 %."""
    rows = [row("mixed_sft", asr_attacked=0.9), row("npo"), row("po", sarr=1.0), row("po+pd")]
    assert len(demo_findings(rows)) == 2
    nothing = Rate(value=None, low=None, high=None, n=0, failed=40)
    for lost in ("asr_attacked", "sarr"):
        changed = [one.model_copy(update={"metrics": one.metrics | {lost: nothing}}) for one in rows]
        assert len(demo_findings(changed)) == 1
    assert demo_findings([row("mixed_sft").model_copy(update={"judges": {"asr": "keyword"}}), row("npo")]) == []


def test_report_shows_remarks_as_text(tmp_path: Path) -> None:
    with plot_formats():
        file = write_report(tmp_path, Summary(rows=[row("npo")]), {}, "Remarks", remarks=["npo <b>wins</b>."])
    assert '<p class="remark">npo &lt;b&gt;wins&lt;/b&gt;.</p>' in file.read_text(encoding="utf-8")


def assert_charts_visible(page) -> None:
    for chart in page.locator(".chart:not([hidden]) svg").all():
        box = chart.bounding_box()
        assert box["width"] > 100
        assert box["height"] > 50


@pytest.mark.browser
def test_report_in_a_browser_runs_no_hostile_script(browser, report: Path) -> None:
    noise: list[str] = []
    page = open_page(browser, report, noise)
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator(".chart svg").count() > 3
    assert_charts_visible(page)
    assert page.locator("#rates tbody tr").count() == 2
    page.set_viewport_size({"width": 390, "height": 800})
    wait_until(page, "document.documentElement.scrollWidth <= 390")
    assert noise == []


@pytest.mark.browser
def test_comparison_in_a_browser_runs_no_hostile_script(browser, comparison_report: Path) -> None:
    noise: list[str] = []
    page = open_page(browser, comparison_report, noise)
    assert_charts_visible(page)
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator("[id^=figure-shots-] svg").count() == 2
    assert page.locator("table.comparisons tbody tr").count() == 3
    assert page.locator("table.published tbody tr").count() == 3
    page.locator("#changes ~ details summary").click()
    page.set_viewport_size({"width": 390, "height": 800})
    wait_until(page, "document.documentElement.scrollWidth <= 390")
    assert noise == []
