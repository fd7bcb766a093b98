"""The page of all answers in a browser: what is shown against the records that it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from answer_runs import JUDGES, MODELS, asked, label_of, made_runs, put_run
from answer_visits import Open, address
from browser import wait_until
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.reporting.answers.answers_page import write_answers
from vlm_unlearn.store import write_json, write_text

PROMPTS = asked()
ROWS = [(number, prompt, model) for number, prompt in enumerate(PROMPTS) for model in MODELS]
SHOWN = 20  # questions on a page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_text(folder / "report.html", "<title>the report</title>")
    return write_answers(folder, made_runs(folder / "runs"), "Three models")


def told(rows: Sequence[tuple[int, Prompt, str]]) -> str:
    """What the page says of so many answers."""
    questions = len({number for number, _, _ in rows})
    if not rows:
        return "No answer matches."
    return f"{len(rows)} answer{'s' * (len(rows) != 1)} to {questions} question{'s' * (questions != 1)}"


def several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def matching(**wanted: Any) -> list[tuple[int, Prompt, str]]:
    """The answers that a filter should let through, by the records."""
    judge = wanted.get("judge", JUDGES[0])

    def fits(number: int, prompt: Prompt, model: str) -> bool:
        label, base = label_of(model, number, judge), label_of("base", number, judge)
        text = f"Answer {number} of {model} to {prompt.id}, Überall.".lower()
        given: Mapping[str, bool] = {
            "model": model == wanted.get("model"),
            "label": (label or "failed") in several(wanted.get("label")),
            "judge": True,
            "case": prompt.set in several(wanted.get("case")),
            "category": prompt.category == wanted.get("category"),
            "changed": label is not None and label != base,
            "disagree": label_of(model, number, JUDGES[0]) != label_of(model, number, JUDGES[1]),
            "q": str(wanted.get("q", "")).lower() in text
            or str(wanted.get("q", "")).lower() in prompt.question.lower(),
            "id": prompt.id == wanted.get("id"),
            "group": prompt.group_id == wanted.get("group"),
        }
        return all(given[name] for name in wanted)

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
    {"q": "number 7, put"},
    {"id": "attacked/3/1"},
    {"group": "attacked/3"},
    {"model": "rmu", "label": "complied", "case": "safe", "category": "Fraud", "changed": 1, "q": "answer"},
    {"q": "nowhere to be found"},
]


@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_a_link_shows_what_the_records_say(visit: Open, report: Path, wanted: dict[str, Any]) -> None:
    page = visit(report, address(**wanted))
    expected = matching(**wanted)
    assert page.inner_text("#count") == told(expected)
    numbers = sorted({number for number, _, _ in expected})[:SHOWN]
    assert page.locator("article").evaluate_all("all => all.map(one => Number(one.dataset.question))") == numbers
    if expected and len(expected) < len(ROWS):
        marked = {number: sum(row[0] == number for row in expected) for number in numbers}
        assert page.locator("article").evaluate_all(
            "all => all.map(one => one.querySelectorAll('[aria-current]').length)"
        ) == list(marked.values())
    assert page.locator(".nothing").count() == (0 if expected else 1)


def choices(page: Any, name: str) -> list[str]:
    return page.locator(f"#{name} option").all_inner_texts()[1:]


def test_each_choice_says_how_many_it_leads_to(visit: Open, report: Path) -> None:
    """Beside each choice stands the number of answers there would be, whatever else is set."""
    page = visit(report, address(model="npo", case="attacked"))
    assert choices(page, "model") == [f"{model} ({len(matching(model=model, case='attacked'))})" for model in MODELS]
    assert choices(page, "case") == [
        f"{case} ({len(matching(model='npo', case=case))})" for case in ("attacked", "mixed", "safe")
    ]
    labels = {"complied": 0, "refused": 0, "degenerate": 0, "off_topic": 0, "score": 0, "failed": 0, "none": 0}
    labels |= {
        label: len(matching(model="npo", case="attacked", label=label))
        for label in labels
        if label not in ("score", "none")
    }
    words = {"off_topic": "off topic", "score": "score only", "none": "not judged"}
    assert choices(page, "label") == [f"{words.get(label, label)} ({count})" for label, count in labels.items()]
    assert page.inner_text("#changed-count") == str(len(matching(model="npo", case="attacked", changed=1)))
    assert page.inner_text("#disagree-count") == str(len(matching(model="npo", case="attacked", disagree=1)))
    refused = visit(report, address(label="refused"))
    assert choices(refused, "judge") == [f"{judge} ({len(matching(label='refused', judge=judge))})" for judge in JUDGES]


def test_controls_write_the_address_and_back_brings_the_view_back(visit: Open, report: Path) -> None:
    page = visit(report)
    page.select_option("#model", label=f"npo ({len(matching(model='npo'))})")
    wait_until(page, "location.hash == '#model=npo'")
    page.check("#changed")
    wait_until(page, "location.hash == '#model=npo&changed=1'")
    page.locator("#q").press_sequentially("safe/1")
    wait_until(page, "location.hash.endsWith('q=safe%2F1')")
    expected = told(matching(model="npo", changed=1, q="safe/1"))
    wait_until(page, f"document.getElementById('count').innerText == {expected!r}")
    assert page.locator("mark").first.inner_text() == "safe/1"
    page.go_back()  # the word that was typed is one step
    wait_until(page, "location.hash == '#model=npo&changed=1'")
    wait_until(page, "document.getElementById('q').value == ''")
    assert page.inner_text("#count") == told(matching(model="npo", changed=1))
    page.go_back()
    wait_until(page, "!document.getElementById('changed').checked")
    page.go_back()
    wait_until(page, "document.getElementById('model').value == '-1'")
    page.go_forward()
    wait_until(page, "document.getElementById('model').selectedIndex == 2")
    page.click("#clear")
    wait_until(page, f"document.getElementById('count').innerText == {told(ROWS)!r}")
    assert page.locator("#clear").is_hidden()


def test_several_choices_stand_in_the_list_until_one_is_chosen(visit: Open, report: Path) -> None:
    page = visit(report, address(label=["refused", "off_topic"], case=["safe", "mixed"]))
    chosen = "select => select.selectedOptions[0].text"
    assert page.locator("#label").evaluate(chosen) == "refused or off topic"
    assert page.locator("#case").evaluate(chosen) == "safe or mixed"
    page.check("#changed")
    wait_until(page, "location.hash == '#label=refused&label=off_topic&case=safe&case=mixed&changed=1'")
    page.select_option("#label", index=2)
    wait_until(page, "location.hash == '#label=refused&case=safe&case=mixed&changed=1'")
    assert page.locator("#label option[value=several]").count() == 0
    expected = told(matching(label="refused", case=["safe", "mixed"], changed=1))
    wait_until(page, f"document.getElementById('count').innerText == {expected!r}")


def test_who_cannot_tell_a_label_does_not_disagree_on_it(visit: Open, tmp_path: Path) -> None:
    """A judge of relevance calls a refusal off topic, for want of the word."""
    prompts = PROMPTS[-3:]
    labels = {
        "four_labels@j": ("refused", "complied", "complied"),
        "relevance@j": ("off_topic", "off_topic", "complied"),
    }
    verdicts = {
        judge: [
            Verdict(prompt_id=prompt.id, judge=judge, label=label) for prompt, label in zip(prompts, given, strict=True)
        ]
        for judge, given in labels.items()
    }
    run = put_run(tmp_path / "m", prompts, [Response(prompt_id=prompt.id, text="So.") for prompt in prompts], verdicts)
    write_json(run / "judge-relevance@j.json", {"labels": ["complied", "off_topic"]})
    page = visit(write_answers(tmp_path / "out", {"m": run}, "t"), "#disagree=1")
    assert page.locator("article").evaluate_all("all => all.map(one => one.dataset.question)") == ["1"]


def test_unknown_words_in_the_address_are_said(visit: Open, report: Path) -> None:
    page = visit(
        report, "#model=<script>alert(1)</script>&label=nice&case=safe&page=-4&sort=upside&what=ever&q=%E0%A4%A"
    )
    assert page.inner_text("#unknown").startswith(
        "Not in this report, and passed over: model “<script>alert(1)</script>”, label “nice”"
    )
    assert page.locator("#case").evaluate("select => select.selectedOptions[0].text").startswith("safe")
    assert visit(report, "#case=safe&page=99").inner_text("[data-page] >> nth=0") == "page 2 of 2"


def test_pages_have_an_address(visit: Open, report: Path) -> None:
    page = visit(report)
    assert page.inner_text("[data-page] >> nth=0") == "page 1 of 4"
    page.click("[data-step='1'] >> nth=0")
    wait_until(page, "location.hash == '#page=2'")
    assert page.locator("article").first.get_attribute("data-question") == str(SHOWN)
    page.select_option("#case", index=3)
    wait_until(page, "location.hash == '#case=safe'")  # another filter begins at its first page
    page.go_back()
    wait_until(page, "document.querySelector('article').dataset.question == '20'")
    page.goto(report.as_uri() + "#page=4")
    assert page.locator("[data-step='1']").first.is_disabled()


def test_answers_stand_side_by_side_with_what_changed(visit: Open, report: Path) -> None:
    page = visit(report, "#id=attacked/0/1")
    cards = page.locator(".answer")
    assert cards.locator(".model").all_inner_texts() == list(MODELS)
    number = 1
    labels = [label_of(model, number, JUDGES[0]) for model in MODELS]
    assert cards.locator(".label").all_inner_texts() == [str(label).replace("_", " ") for label in labels]
    changes = [f"changed, was {labels[0]}" for label in labels[1:] if label != labels[0]]
    assert changes
    assert cards.locator(".changed").all_inner_texts() == changes
    page.click("article .show")
    verdicts = [
        f"{judge}: {str(label_of(model, number, judge)).replace('_', ' ')}" for model in MODELS for judge in JUDGES
    ]
    assert cards.locator(".verdicts li").all_inner_texts() == verdicts
    assert set(cards.locator(".verdicts strong bdi").all_inner_texts()) == {JUDGES[0]}  # whose label the card has
    assert page.locator("article a >> nth=0").get_attribute("href") == "#case=attacked&group=attacked%2F0"
    page.click("article a >> nth=0")
    wait_until(page, "document.querySelectorAll('article').length == 3")


def test_what_stands_beside_a_match_can_be_chosen(visit: Open, report: Path) -> None:
    models = {
        beside: visit(report, f"#id=safe/0/0&model=npo&beside={beside}").locator(".model").all_inner_texts()
        for beside in ("", "base", "none")
    }
    assert models == {"": ["base", "npo", "rmu"], "base": ["base", "npo"], "none": ["npo"]}


def test_disagreement_is_marked(visit: Open, report: Path) -> None:
    page = visit(report, "#disagree=1&beside=none")
    assert page.locator(".answer").count() == len(matching(disagree=1)) > 0
    assert page.locator(".answer:has(.split)").count() == page.locator(".answer").count()
    assert page.locator(".answer.aside").count() == 0


def test_the_most_changed_come_first(visit: Open, report: Path) -> None:
    page = visit(report, "#sort=changed")
    shown = page.locator("article").evaluate_all("all => all.map(one => one.querySelectorAll('.changed').length)")
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == 2


def is_blurred(part: Any) -> bool:
    return bool(part.evaluate("part => getComputedStyle(part).filter.includes('blur')"))


def test_what_is_harmful_is_hidden_until_asked_for(visit: Open, report: Path) -> None:
    page = visit(report, "#case=attacked")
    article = page.locator("article").first
    parts = article.locator(".veil")
    assert parts.count() == 5  # image, question, three answers
    assert all(is_blurred(part) and part.evaluate("part => part.inert") for part in parts.all())
    assert "What of attacked" not in page.locator("article").first.aria_snapshot()
    assert page.locator("article .label").first.is_visible()  # what became of it is no secret
    page.evaluate("getSelection().selectAllChildren(document.body)")
    assert "What of attacked" not in page.evaluate("getSelection().toString()")
    button = article.locator(".show")
    assert button.get_attribute("aria-label") == "Show the harmful content of question 1"
    button.click()
    assert not any(is_blurred(part) or part.evaluate("part => part.inert") for part in parts.all())
    assert "What of attacked" in article.aria_snapshot()
    assert is_blurred(page.locator("article").nth(1).locator(".asked"))  # the next one is still hidden
    button.click()
    assert is_blurred(parts.first)
    page.check("#reveal")
    assert page.locator(".veiled").count() == 0
    page.locator("article .show").nth(2).click()
    assert is_blurred(page.locator("article").nth(2).locator(".asked"))
    page.reload()
    page.wait_for_selector("article")
    assert page.locator("article .veiled").count() == 5 * SHOWN  # nothing is remembered beyond the page


def test_what_is_harmless_is_never_hidden(visit: Open, report: Path) -> None:
    safe = visit(report, "#case=safe")
    assert safe.locator("article").count() == SHOWN
    assert safe.locator(".veiled, .show").count() == 0
    assert not is_blurred(safe.locator("article img").first)
    mixed = visit(report, "#case=mixed")
    assert not is_blurred(mixed.locator("article img").first)  # a harmless image
    assert is_blurred(mixed.locator("article .asked").first)


def focused(page: Any) -> str | None:
    return page.evaluate("document.activeElement.closest('article')?.dataset.question ?? null")


def test_by_keyboard(visit: Open, report: Path) -> None:
    page = visit(report)
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert focused(page) == "1"
    assert page.locator("article").nth(1).evaluate("article => getComputedStyle(article).outlineStyle") == "solid"
    page.keyboard.press("r")
    assert page.locator("article").nth(1).locator(".veiled").count() == 0
    page.keyboard.press("k")
    assert focused(page) == "0"
    page.keyboard.press("Tab")  # into the question: its links, then the button
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("article").first.locator(".veiled").count() == 0
    for _ in range(SHOWN):
        page.keyboard.press("j")
    wait_until(page, "location.hash == '#page=2'")
    wait_until(page, "document.activeElement.dataset.question == '20'")
    page.keyboard.press("k")
    wait_until(page, "document.activeElement.dataset.question == '19'")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("jrk/")  # letters, in a field
    wait_until(page, "document.getElementById('count').innerText == 'No answer matches.'")
    page.click(".nothing button")
    page.wait_for_selector("article")
    page.uncheck("#keys")
    page.keyboard.press("j")
    assert focused(page) is None


def test_every_control_has_a_name(visit: Open, report: Path) -> None:
    page = visit(report)
    unnamed = "all => all.filter(one => !one.labels?.length && !one.textContent.trim() && !one.ariaLabel).length"
    assert page.locator("input, select, button").evaluate_all(unnamed) == 0
    assert page.locator("main").count() == 1
    assert page.get_attribute("#count", "aria-live") == "polite"
    assert page.locator("h1, h2").evaluate_all("all => all.map(one => one.tagName)") == ["H1", *["H2"] * SHOWN]
    page.click("a:has-text('Report')")
    wait_until(page, "document.title == 'the report'")


def contrast(page: Any, selector: str) -> float:
    """The contrast of an element's text with what is behind it, after WCAG 2.2."""
    return float(
        page.locator(selector).first.evaluate(
            """element => {
              const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
              const light = (colour) => {
                canvas.clearRect(0, 0, 1, 1);
                canvas.fillStyle = colour;
                canvas.fillRect(0, 0, 1, 1);
                const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              let ground = element;
              while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)" && ground.parentElement) ground = ground.parentElement;
              const pair = [light(getComputedStyle(element).color), light(getComputedStyle(ground).backgroundColor)].sort();
              return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            }"""
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(visit: Open, report: Path, scheme: str) -> None:
    page = visit(report, "#q=answer&beside=none", color_scheme=scheme)
    page.check("#reveal")
    red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (red < 60) == (scheme == "dark")
    for selector in (
        "h1",
        ".text",
        ".label",
        ".changed",
        ".soft",
        "mark",
        "a",
        "kbd",
        ".model",
        ".pages button:disabled",
        ".pages button",
    ):
        assert contrast(page, selector) >= 4.5, selector


def test_on_a_phone(visit: Open, report: Path) -> None:
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


def test_printed_it_shows_the_answers_and_no_controls(visit: Open, report: Path) -> None:
    page = visit(report, "#case=attacked")
    page.emulate_media(media="print")
    assert page.locator("#filters").is_hidden()
    assert page.locator("article .show").first.is_hidden()
    assert page.locator("article .label").first.is_visible()
    assert page.locator("article .veiled").first.evaluate("part => getComputedStyle(part).visibility") == "hidden"
    assert "hidden when this was printed" in page.locator("article .head").first.evaluate(
        "head => getComputedStyle(head, '::after').content"
    )
    assert page.pdf().startswith(b"%PDF")
