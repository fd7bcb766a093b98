"""report.html in a browser: sorting, filters, color schemes, a phone, the keyboard and print.

The tests with the marker `slow` check details. The others are a short check of the page as a whole.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlencode

import pytest

from answer_visits import Open, go
from browser import open_page
from finished_runs import REFUSAL, complies, make_run, number, plot_formats, unlearned
from vlm_unlearn.config import JudgeConfig, Suite, load
from vlm_unlearn.evaluation.benchmarks import SPECIFICITY_BENCHMARKS
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.verdicts import judge_run
from vlm_unlearn.records import Prompt
from vlm_unlearn.reporting.metric_roles import answers_link, changes_link
from vlm_unlearn.reporting.report import write_report
from vlm_unlearn.store import RunDirectory, write_json

browser_test = pytest.mark.browser
METRICS = {
    "asr": {"splits": ["attacked"], "labels": ["complied"], "aggregate": "any_per_question"},
    "refusal_rate": {"splits": ["safe"], "labels": ["refused"]},
    "utility": {"splits": ["safe"], "labels": ["complied"]},
}
HOSTILE = "<i>npo</i>$\u202e$"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models: one answers everything, one was unlearned and has a hostile name, one refuses everything."""
    folder = tmp_path_factory.mktemp("runs")
    training = folder / "training"
    RunDirectory(training).open({"kind": "train", "recipe": {"training": {"seed": 7}}})
    (training / "log.jsonl").write_text(
        '{"step": 1, "loss": 2.0, "forget": 1.5}\n{"step": 2, "loss": NaN, "forget": 1.0}\n'
    )
    RunDirectory(training).record_cost(3.0, finished=True, ended={"steps": 2})
    runs = {
        "base": make_run(folder / "base", complies, metrics=METRICS),
        HOSTILE: make_run(folder / "npo", unlearned, metrics=METRICS, model=str(training)),
        "po": make_run(folder / "po", lambda prompt: REFUSAL, metrics=METRICS),
    }
    summary, _ = compare_runs(runs)
    out = tmp_path_factory.mktemp("out")
    write_json(out / "summary.json", summary.model_dump())
    return write_report(out, summary, runs, "Three models")


def order(page) -> list[str]:
    return page.locator("#rates tbody tr:visible th").all_inner_texts()


@browser_test
def test_first_screen_has_assessments_trade_off_and_table(browser, report: Path) -> None:
    noise: list[str] = []
    page = open_page(browser, report, noise, viewport={"width": 1280, "height": 900})
    assert page.locator("#figure-tradeoff-refusals svg").is_visible()
    assert page.locator(".assessments li").count() == 3
    assert "160 questions each" in page.locator("header").inner_text()
    assert "seed 7" in page.locator("header").inner_text()
    assert page.locator("#attacks").count() == 0  # no attack was measured
    names = page.locator("#figure-tradeoff-refusals svg text").all_text_contents()
    assert "<i>npo</i>$\\u202e$" in names
    assert "ideal corner" in names
    assert page.locator("#rates").bounding_box()["y"] < 900
    levels = [page.evaluate("element => element.tagName", heading) for heading in page.query_selector_all("h1, h2, h3")]
    assert levels[0] == "H1"
    assert set(levels[1:]) == {"H2"}
    assert noise == []


@browser_test
def test_table_sorts_filters_and_hides_columns(browser, report: Path) -> None:
    noise: list[str] = []
    page = open_page(browser, report, noise)
    assert order(page)[0] == "base"
    heading = page.locator("#rates thead th", has_text="ASR")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert order(page)[-1] == "base"
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert order(page)[0] == "base"
    page.keyboard.press("Space")
    assert heading.get_attribute("aria-sort") is None
    page.locator("#rates thead th").first.locator("button").click()
    assert order(page)[1:] == ["base", "po"]
    assert page.locator("#rates [aria-sort]").count() == 1
    page.locator("#filter").fill("NPO")
    assert len(order(page)) == 1
    assert page.locator("#count").inner_text() == "1 of 3 models"
    page.locator("#filter").fill("not in any name")
    assert order(page) == []
    assert page.locator(".no-match").is_visible()
    page.locator("#filter").fill("")
    page.locator(".menu summary").click()
    page.locator(".menu label", has_text="Utility").locator("input").uncheck()
    assert page.locator("#rates thead th:visible", has_text="Utility").count() == 0
    assert page.locator("#rates tbody tr").first.locator("td:visible").count() == 2
    page.keyboard.press("Escape")
    assert page.locator(".menu[open]").count() == 0
    assert noise == []


@browser_test
@pytest.mark.slow
def test_loss_menu_shows_the_selected_chart(browser, report: Path) -> None:
    noise: list[str] = []
    page = open_page(browser, report, noise)
    page.locator("#loss ~ .choice select").select_option(index=1)
    assert page.locator("#figure-loss-2 svg").is_visible()
    assert page.locator("#figure-loss-1").is_hidden()
    page.locator("#loss ~ .choice select").select_option(index=0)
    assert page.locator("#figure-loss-1 svg").is_visible()
    assert page.locator("#figure-loss-2").is_hidden()
    assert noise == []


@browser_test
@pytest.mark.slow
def test_color_scheme_changes_page_and_charts_and_print_is_light(browser, report: Path) -> None:
    page = open_page(browser, report, [], color_scheme="light")

    def colors() -> tuple[str, str, set[str]]:
        """Returns the colors of the page, of a chart's texts and of its lines."""
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        chart = page.locator("#figure-tradeoff-refusals svg")
        (text,) = set(
            chart.locator("text", has_text="%").evaluate_all("all => all.map((one) => getComputedStyle(one).fill)")
        )
        strokes = chart.locator("path, use").evaluate_all("all => all.map((one) => getComputedStyle(one).stroke)")
        return background, text, set(strokes)

    light, dark = "rgb(27, 29, 33)", "rgb(236, 238, 242)"
    background, text, strokes = colors()
    assert (background, text) == ("rgb(255, 255, 255)", light)
    assert light in strokes
    page.emulate_media(color_scheme="dark")
    background, text, strokes = colors()
    assert (background, text) == ("rgb(22, 24, 29)", dark)
    assert dark in strokes
    assert not strokes & {light, "rgb(0, 0, 0)"}
    page.emulate_media(media="print", color_scheme="dark")
    background, text, strokes = colors()
    assert (background, text) == ("rgb(255, 255, 255)", light)
    charts = page.locator(".chart:not([hidden]) svg")
    assert charts.count() >= 5
    assert charts.evaluate_all("all => all.every((one) => one.checkVisibility() && one.clientWidth > 0)")
    assert page.locator(".tools").is_hidden()
    assert page.pdf(format="A4").startswith(b"%PDF")


@browser_test
@pytest.mark.slow
def test_phone_does_not_scroll_sideways(browser, report: Path) -> None:
    page = open_page(browser, report, [], viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#figure-tradeoff-refusals svg").bounding_box()["width"] <= 390
    letters = page.locator(".chart:not([hidden]) svg text").evaluate_all(
        "all => all.map((one) => one.ownerSVGElement.getScreenCTM().a * parseFloat(getComputedStyle(one).fontSize))"
    )
    assert min(letters) > 7  # pixels
    page.locator(".menu summary").click()
    box = page.locator(".menu fieldset").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


@browser_test
@pytest.mark.slow
def test_links_have_targets_and_all_controls_are_reached_by_keyboard(browser, report: Path) -> None:
    page = open_page(browser, report, [])
    links = page.locator("a").evaluate_all("all => all.map((one) => one.getAttribute('href'))")
    for link in links:
        file, _, fragment = link.partition("#")
        if file:
            assert (report.parent / file).is_file(), link
            filters = parse_qs(fragment, strict_parsing=True) if fragment else {}
            assert filters.keys() <= {"model", "case", "label", "judge", "changed"}, link
            assert set(filters.get("model", [])) <= {"base", HOSTILE, "po"}
            assert set(filters.get("case", [])) <= {"attacked", "safe"}
        else:
            assert page.locator(f"[id='{fragment}']").count() == 1
    assert "report/answers.html#model=po&label=refused&case=safe" in links
    assert "report/answers.html#model=po&case=safe&changed=1" in links
    assert "report/plots/tradeoff-use.svg" in links
    assert [link for link in links if link.endswith(".csv")]
    page.evaluate(
        """for (const one of document.querySelectorAll("a[href], button, input, select, summary, [tabindex='0']"))
             if (one.checkVisibility() && !one.closest("details:not([open]) > :not(summary)"))
               one.dataset.control = "";"""
    )
    controls = page.locator("[data-control]").count()
    assert controls > 40
    for _ in range(controls + 20):
        page.keyboard.press("Tab")
        page.evaluate("document.activeElement.removeAttribute('data-control')")
    assert page.locator("[data-control]").evaluate_all("all => all.map((one) => one.outerHTML)") == []


@browser_test
@pytest.mark.slow
def test_without_javascript_all_charts_are_visible(browser, report: Path) -> None:
    page = open_page(browser, report, [], java_script_enabled=False)
    charts = page.locator(".chart svg")
    assert charts.count() >= 5
    assert all(chart.is_visible() for chart in charts.all())
    assert page.locator("#filter").is_hidden()


COUNTED = {
    **METRICS,
    "degenerate_rate": {"splits": ["attacked", "safe"], "labels": ["degenerate"]},
    "sarr": {"splits": ["safe"], "labels": ["refused", "degenerate"]},
    "asr_each": {"splits": ["attacked"], "labels": ["complied"]},
    "utility_with_failures": {"splits": ["safe"], "labels": ["complied"], "on_error": "count_as_miss"},
    "rouge_l": {"splits": ["safe"], "judge": "reference", "score": "mean"},
}
GROUPS = (
    "[...result.matches].flatMap((match, answer) => match ? [textAt(questions.group[answers.question[answer]])] : [])"
)


def degenerate_sometimes(prompt: Prompt) -> str | None:
    """Like `unlearned`, but one answer of each split fails, and some are degenerate."""
    if number(prompt) == 7:
        return None
    return "the the the the the the the the the the" if number(prompt) % 9 == 1 else unlearned(prompt)


@browser_test
@pytest.mark.slow
def test_link_of_a_rate_selects_the_answers_that_it_counts(visit: Open, tmp_path: Path) -> None:
    runs = {
        model: make_run(
            tmp_path / model,
            answer,
            metrics=COUNTED,
            judges={"reference": {"name": "rouge_l"}},
            edit=lambda prompt: prompt.model_copy(update={"reference": "First take the red one."}),
        )
        for model, answer in (("base", complies), ("degenerate", degenerate_sometimes))
    }
    for run in runs.values():
        judge_run(run, JudgeConfig(name="rouge_l"), splits=["safe"])
    summary, _ = compare_runs(runs)
    with plot_formats():
        first = write_report(tmp_path / "out", summary, runs, "Links")
    text = first.read_text(encoding="utf-8").replace("&amp;", "&")
    suite = saved_suite(runs["base"])
    page = visit(first.parent / "report" / "answers.html")
    values = set()
    for row in summary.rows:
        for metric, rate in row.metrics.items():
            address = urlencode(answers_link(row.model, metric, suite))
            assert f"report/answers.html#{address}" in text
            go(page, f"#{address}")
            groups = page.evaluate(GROUPS)
            config = suite.metrics[metric]
            count = len(set(groups)) if config.aggregate == "any_per_question" else len(groups)
            assert count == (rate.n + rate.failed if config.score else round(rate.value * rate.n)), (row.model, metric)
            assert page.locator("#unknown").is_hidden()
            values.add(rate.value)
    assert len(values) > 5


def test_answers_link_of_a_benchmark_selects_its_answers() -> None:
    suite = load(Suite, "suites/specificity", ["model=m", "root=."])
    assert answers_link("m", "gqa", suite) == [("model", "m"), ("case", "gqa")]
    assert [value for name, value in answers_link("m", "specificity", suite) if name == "case"] == list(
        SPECIFICITY_BENCHMARKS
    )
    assert changes_link("m", "gqa", suite) == [("model", "m"), ("case", "gqa"), ("changed", "1")]
    assert answers_link("m", "not_a_metric", suite) == []
