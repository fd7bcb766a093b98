"""The answers page in a browser, compared with the records that it was made from.

The tests with the marker `slow` check details. The others are a short check of the page as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from answer_runs import JUDGES, MODELS, example_prompts, label_of, make_example_runs, put_run
from answer_visits import Open, address, go
from browser import wait_until
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.reporting.answers.answers_page import write_answers
from vlm_unlearn.store import write_json, write_text

pytestmark = pytest.mark.browser
PROMPTS = example_prompts()
ROWS = [(number, prompt, model) for number, prompt in enumerate(PROMPTS) for model in MODELS]
PAGE = 20  # questions on a page
NUMBERS = "articles => articles.map(article => Number(article.dataset.question))"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_text(folder / "report.html", "<title>the report</title>")
    return write_answers(folder, make_example_runs(folder / "runs"), "Three models")


def count_text(rows: Sequence[tuple[int, Prompt, str]]) -> str:
    """Returns the page's text for a number of answers."""
    questions = len({number for number, _, _ in rows})
    if not rows:
        return "No answer matches."
    return f"{len(rows)} answer{'s' * (len(rows) != 1)} to {questions} question{'s' * (questions != 1)}"


def as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def matching(**filters: Any) -> list[tuple[int, Prompt, str]]:
    """Returns the answers that match a filter, computed from the records."""
    judge = filters.get("judge", JUDGES[0])
    query = str(filters.get("q", "")).lower()

    def fits(number: int, prompt: Prompt, model: str) -> bool:
        label, base = label_of(model, number, judge), label_of("base", number, judge)
        text = f"Answer {number} of {model} to {prompt.id}, Überall.".lower()
        passes: Mapping[str, bool] = {
            "model": model == filters.get("model"),
            "label": (label or "failed") in as_list(filters.get("label")),
            "judge": True,
            "case": prompt.set in as_list(filters.get("case")),
            "category": prompt.category == filters.get("category"),
            "changed": label is not None and label != base,
            "disagree": label_of(model, number, JUDGES[0]) != label_of(model, number, JUDGES[1]),
            "q": query in text or query in prompt.question.lower(),
            "id": prompt.id == filters.get("id"),
            "group": prompt.group_id == filters.get("group"),
        }
        return all(passes[name] for name in filters)

    return [row for row in ROWS if fits(*row)]


FILTERS: list[dict[str, Any]] = [
    {},
    {"model": "npo"},
    {"label": "refused"},
    {"label": "failed"},
    {"case": "mixed"},
    {"category": "Privacy"},
    {"changed": 1},
    {"disagree": 1},
    {"judge": JUDGES[1], "label": "off_topic"},
    {"judge": JUDGES[1], "changed": 1},
    {"label": ["refused", "degenerate", "off_topic"]},
    {"model": "npo", "case": ["attacked", "safe"], "label": ["complied", "failed"]},
    {"q": "ÜBERALL"},
    {"q": "of npo to safe/1"},
    {"q": "number 7, in"},
    {"id": "attacked/3/1"},
    {"group": "attacked/3"},
    {"model": "rmu", "label": "complied", "case": "safe", "category": "Fraud", "changed": 1, "q": "answer"},
    {"q": "not in any text"},
]


def check_view(page: Any, filters: dict[str, Any]) -> None:
    expected = matching(**filters)
    assert page.inner_text("#count") == count_text(expected), filters
    numbers = sorted({number for number, _, _ in expected})[:PAGE]
    assert page.locator("article").evaluate_all(NUMBERS) == numbers, filters
    if expected and len(expected) < len(ROWS):
        marked = [sum(row[0] == number for row in expected) for number in numbers]
        count = "articles => articles.map(article => article.querySelectorAll('[aria-current]').length)"
        assert page.locator("article").evaluate_all(count) == marked, filters
    assert page.locator(".no-match").count() == (0 if expected else 1), filters


def test_filter_in_the_address_shows_the_matching_answers(visit: Open, report: Path) -> None:
    first, *others = FILTERS
    page = visit(report, address(**first))
    check_view(page, first)
    for filters in others:
        check_view(go(page, address(**filters)), filters)
    opened = visit(report, address(**FILTERS[-2]))  # also as the first view of a page
    check_view(opened, FILTERS[-2])


def options(page: Any, name: str) -> list[str]:
    return page.locator(f"#{name} option").all_inner_texts()[1:]


@pytest.mark.slow
def test_filter_options_show_the_number_of_answers_they_select(visit: Open, report: Path) -> None:
    page = visit(report, address(model="npo", case="attacked"))
    assert options(page, "model") == [f"{model} ({len(matching(model=model, case='attacked'))})" for model in MODELS]
    assert options(page, "case") == [
        f"{split} ({len(matching(model='npo', case=split))})" for split in ("attacked", "mixed", "safe")
    ]
    labels = {"complied": 0, "refused": 0, "degenerate": 0, "off_topic": 0, "score": 0, "failed": 0, "none": 0}
    labels |= {
        label: len(matching(model="npo", case="attacked", label=label))
        for label in labels
        if label not in ("score", "none")
    }
    titles = {"off_topic": "off topic", "score": "score only", "none": "not judged"}
    assert options(page, "label") == [f"{titles.get(label, label)} ({count})" for label, count in labels.items()]
    assert page.inner_text("#changed-count") == str(len(matching(model="npo", case="attacked", changed=1)))
    assert page.inner_text("#disagree-count") == str(len(matching(model="npo", case="attacked", disagree=1)))
    go(page, address(label="refused"))
    assert options(page, "judge") == [f"{judge} ({len(matching(label='refused', judge=judge))})" for judge in JUDGES]


def test_controls_change_the_address_and_back_restores_the_view(visit: Open, report: Path) -> None:
    page = visit(report)
    page.select_option("#model", label=f"npo ({len(matching(model='npo'))})")
    wait_until(page, "location.hash == '#model=npo'")
    page.check("#changed")
    wait_until(page, "location.hash == '#model=npo&changed=1'")
    page.locator("#q").press_sequentially("safe/1")
    wait_until(page, "location.hash.endsWith('q=safe%2F1')")
    expected = count_text(matching(model="npo", changed=1, q="safe/1"))
    wait_until(page, f"document.getElementById('count').innerText == {expected!r}")
    assert page.locator("mark").first.inner_text() == "safe/1"
    page.go_back()  # a query that was typed without a pause is one step
    wait_until(page, "location.hash == '#model=npo&changed=1'")
    wait_until(page, "document.getElementById('q').value == ''")
    assert page.inner_text("#count") == count_text(matching(model="npo", changed=1))
    page.go_back()
    wait_until(page, "!document.getElementById('changed').checked")
    page.go_back()
    wait_until(page, "document.getElementById('model').value == '-1'")
    page.go_forward()
    wait_until(page, "document.getElementById('model').selectedIndex == 2")
    page.click("#clear")
    wait_until(page, f"document.getElementById('count').innerText == {count_text(ROWS)!r}")
    assert page.locator("#clear").is_hidden()


@pytest.mark.slow
def test_several_values_are_one_option_until_another_is_selected(visit: Open, report: Path) -> None:
    page = visit(report, address(label=["refused", "off_topic"], case=["safe", "mixed"]))
    selection = "select => select.selectedOptions[0].text"
    assert page.locator("#label").evaluate(selection) == "refused or off topic"
    assert page.locator("#case").evaluate(selection) == "safe or mixed"
    page.check("#changed")
    wait_until(page, "location.hash == '#label=refused&label=off_topic&case=safe&case=mixed&changed=1'")
    page.select_option("#label", index=2)
    wait_until(page, "location.hash == '#label=refused&case=safe&case=mixed&changed=1'")
    assert page.locator("#label option[value=several]").count() == 0
    expected = count_text(matching(label="refused", case=["safe", "mixed"], changed=1))
    wait_until(page, f"document.getElementById('count').innerText == {expected!r}")


@pytest.mark.slow
def test_judge_without_a_label_does_not_disagree_on_it(visit: Open, tmp_path: Path) -> None:
    """A judge of relevance cannot give "refused", so its "off topic" is not a disagreement."""
    prompts = PROMPTS[-3:]
    labels = {
        "four_labels@j": ("refused", "complied", "complied"),
        "relevance@j": ("off_topic", "off_topic", "complied"),
    }
    verdicts = {
        judge: [
            Verdict(prompt_id=prompt.id, judge=judge, label=label) for prompt, label in zip(prompts, of, strict=True)
        ]
        for judge, of in labels.items()
    }
    run = put_run(tmp_path / "m", prompts, [Response(prompt_id=prompt.id, text="So.") for prompt in prompts], verdicts)
    write_json(run / "judge-relevance@j.json", {"labels": ["complied", "off_topic"]})
    page = visit(write_answers(tmp_path / "out", {"m": run}, "t"), "#disagree=1")
    assert page.locator("article").evaluate_all(NUMBERS) == [1]


@pytest.mark.slow
def test_address_with_unknown_values_names_them(visit: Open, report: Path) -> None:
    page = visit(
        report, "#model=<script>alert(1)</script>&label=nice&case=safe&page=-4&sort=upside&what=ever&q=%E0%A4%A"
    )
    for value in ("model “<script>alert(1)</script>”", "label “nice”", "sort “upside”"):
        assert value in page.inner_text("#unknown")
    assert page.locator("#case").evaluate("select => select.selectedOptions[0].text").startswith("safe")
    go(page, "#case=safe&page=99")
    assert page.inner_text("[data-page] >> nth=0") == "page 2 of 2"


@pytest.mark.slow
def test_pages_have_an_address(visit: Open, report: Path) -> None:
    page = visit(report)
    assert page.inner_text("[data-page] >> nth=0") == "page 1 of 4"
    page.click("[data-step='1'] >> nth=0")
    wait_until(page, "location.hash == '#page=2'")
    assert page.locator("article").first.get_attribute("data-question") == str(PAGE)
    page.select_option("#case", index=3)
    wait_until(page, "location.hash == '#case=safe'")  # another filter starts on its first page
    page.go_back()
    wait_until(page, "document.querySelector('article').dataset.question == '20'")
    go(page, "#page=4")
    assert page.locator("[data-step='1']").first.is_disabled()


@pytest.mark.slow
def test_answers_are_shown_next_to_each_other_with_changes_and_disagreements(visit: Open, report: Path) -> None:
    page = visit(report, "#id=attacked/0/1")
    cards = page.locator(".answer")
    assert cards.locator(".model").all_inner_texts() == list(MODELS)
    number = 1
    labels = [label_of(model, number, JUDGES[0]) for model in MODELS]
    assert cards.locator(".label").all_inner_texts() == [str(label).replace("_", " ") for label in labels]
    changes = [f"changed from {labels[0]}" for label in labels[1:] if label != labels[0]]
    assert changes
    assert cards.locator(".changed").all_inner_texts() == changes
    page.click("article .reveal-button")
    verdicts = [
        f"{judge}: {str(label_of(model, number, judge)).replace('_', ' ')}" for model in MODELS for judge in JUDGES
    ]
    assert cards.locator(".verdicts li").all_inner_texts() == verdicts
    assert set(cards.locator(".verdicts strong bdi").all_inner_texts()) == {JUDGES[0]}  # the judge of the label above
    assert page.locator("article a >> nth=0").get_attribute("href") == "#case=attacked&group=attacked%2F0"
    page.click("article a >> nth=0")
    wait_until(page, "document.querySelectorAll('article').length == 3")
    for beside, models in (("", ["base", "npo", "rmu"]), ("base", ["base", "npo"]), ("none", ["npo"])):
        go(page, f"#id=safe/0/0&model=npo&beside={beside}")
        # The browser lays new articles out in a later frame, and texts without a layout are empty.
        wait_until(page, "[...document.querySelectorAll('.model')].every(element => element.innerText)")
        assert page.locator(".model").all_inner_texts() == models
    go(page, "#disagree=1&beside=none")
    assert page.locator(".answer").count() == len(matching(disagree=1)) > 0
    assert page.locator(".answer:has(.disagreement)").count() == page.locator(".answer").count()
    assert page.locator(".answer.context").count() == 0
    go(page, "#sort=changed")
    count = "articles => articles.map(article => article.querySelectorAll('.changed').length)"
    counts = page.locator("article").evaluate_all(count)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 2


def is_blurred(element: Any) -> bool:
    return bool(element.evaluate("element => getComputedStyle(element).filter.includes('blur')"))


def test_harmful_content_is_hidden_until_revealed_and_harmless_content_never(visit: Open, report: Path) -> None:
    page = visit(report, "#case=attacked")
    article = page.locator("article").first
    elements = article.locator(".sensitive")
    assert elements.count() == 5  # image, question, three answers
    assert all(is_blurred(element) and element.evaluate("element => element.inert") for element in elements.all())
    assert "What of attacked" not in page.locator("article").first.aria_snapshot()
    assert page.locator("article .label").first.is_visible()  # labels are not hidden
    page.evaluate("getSelection().selectAllChildren(document.body)")
    assert "What of attacked" not in page.evaluate("getSelection().toString()")
    button = article.locator(".reveal-button")
    assert button.get_attribute("aria-label") == "Show the harmful content of question 1"
    button.click()
    assert not any(is_blurred(element) or element.evaluate("element => element.inert") for element in elements.all())
    assert "What of attacked" in article.aria_snapshot()
    assert is_blurred(page.locator("article").nth(1).locator(".prompt"))  # the next one is still hidden
    button.click()
    assert is_blurred(elements.first)
    page.check("#reveal")
    assert page.locator(".hidden-content").count() == 0
    page.locator("article .reveal-button").nth(2).click()
    assert is_blurred(page.locator("article").nth(2).locator(".prompt"))
    page.reload()
    page.wait_for_selector("article")
    assert page.locator("article .hidden-content").count() == 5 * PAGE  # the page stores nothing
    go(page, "#case=safe")
    assert page.locator("article").count() == PAGE
    assert page.locator(".hidden-content, .reveal-button").count() == 0
    assert not is_blurred(page.locator("article img").first)
    go(page, "#case=mixed")
    assert not is_blurred(page.locator("article img").first)  # a harmless image
    assert is_blurred(page.locator("article .prompt").first)


def focused(page: Any) -> str | None:
    return page.evaluate("document.activeElement.closest('article')?.dataset.question ?? null")


@pytest.mark.slow
def test_keyboard_moves_reveals_and_searches(visit: Open, report: Path) -> None:
    page = visit(report)
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert focused(page) == "1"
    assert page.locator("article").nth(1).evaluate("article => getComputedStyle(article).outlineStyle") == "solid"
    page.keyboard.press("r")
    assert page.locator("article").nth(1).locator(".hidden-content").count() == 0
    page.keyboard.press("k")
    assert focused(page) == "0"
    for _ in range(3):  # the two links of the question, then its button
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("article").first.locator(".hidden-content").count() == 0
    for _ in range(PAGE):
        page.keyboard.press("j")
    wait_until(page, "location.hash == '#page=2'")
    wait_until(page, "document.activeElement.dataset.question == '20'")
    page.keyboard.press("k")
    wait_until(page, "document.activeElement.dataset.question == '19'")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("jrk/")  # in a field, keys are letters
    wait_until(page, "document.getElementById('count').innerText == 'No answer matches.'")
    page.click(".no-match button")
    page.wait_for_selector("article")
    page.uncheck("#keys")
    page.keyboard.press("j")
    assert focused(page) is None


@pytest.mark.slow
def test_controls_have_accessible_names_and_headings_are_nested(visit: Open, report: Path) -> None:
    page = visit(report)
    unnamed = "all => all.filter(one => !one.labels?.length && !one.textContent.trim() && !one.ariaLabel).length"
    assert page.locator("input, select, button").evaluate_all(unnamed) == 0
    assert page.locator("main").count() == 1
    assert page.get_attribute("#count", "aria-live") == "polite"
    assert page.locator("h1, h2").evaluate_all("all => all.map(one => one.tagName)") == ["H1", *["H2"] * PAGE]
    page.click("a:has-text('Report')")
    wait_until(page, "document.title == 'the report'")


CONTRASTS = """selectors => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Object.fromEntries(selectors.map((selector) => {
    const element = document.querySelector(selector);
    let ground = element;
    while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)" && ground.parentElement) ground = ground.parentElement;
    const pair = [luminance(getComputedStyle(element).color), luminance(getComputedStyle(ground).backgroundColor)].sort();
    return [selector, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
  }));
}"""  # noqa: E501  JavaScript
TEXTS = (
    *("h1", ".text", ".label", ".changed", ".soft", "mark", "a", "kbd", ".model"),
    *(".pages button:disabled", ".pages button"),
)


@pytest.mark.slow
def test_text_has_contrast_in_light_and_dark(visit: Open, report: Path) -> None:
    """The contrast of the text with its background is at least 4.5 (WCAG 2.2, 1.4.3)."""
    page = visit(report, "#q=answer&beside=none", color_scheme="light")
    page.check("#reveal")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert (red < 60) == (scheme == "dark")
        low = {name: value for name, value in page.evaluate(CONTRASTS, list(TEXTS)).items() if value < 4.5}
        assert low == {}, scheme


@pytest.mark.slow
def test_phone_folds_the_filters_and_does_not_scroll_sideways(visit: Open, report: Path) -> None:
    page = visit(report, "#case=safe", viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#q").is_hidden()
    assert page.inner_text("#filters summary") == "Filters (1 set)"
    page.click("#filters summary")
    page.fill("#q", "safe/2/0")
    wait_until(page, "document.querySelectorAll('article').length == 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 900})
    wait_until(page, "document.getElementById('filters').open")


@pytest.mark.slow
def test_print_shows_the_answers_without_controls_and_names_the_page(visit: Open, report: Path) -> None:
    page = visit(report, "#case=attacked&page=2")
    assert not page.locator(".only-print").is_visible()
    page.emulate_media(media="print")
    assert "page 2 of 2" in page.locator(".only-print").inner_text()
    assert page.locator("#filters").is_hidden()
    assert page.locator("article .reveal-button").first.is_hidden()
    assert page.locator("article .label").first.is_visible()
    hidden = page.locator("article .hidden-content").first
    assert hidden.evaluate("element => getComputedStyle(element).visibility") == "hidden"
    content = page.locator("article .head").first.evaluate("head => getComputedStyle(head, '::after').content")
    assert "hidden" in content
    assert page.pdf().startswith(b"%PDF")
