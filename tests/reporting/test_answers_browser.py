"""The page of all answers in a browser: what is shown against the records that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from answer_runs import JUDGES, MODELS, asked, label_of, made_runs, put_run
from browser import browser  # noqa: F401  a fixture
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.reporting.answers_page import write_answers
from vlm_unlearn.store import write_text

PROMPTS = asked()
ROWS = [(number, prompt, model) for number, prompt in enumerate(PROMPTS) for model in MODELS]
SHOWN = 20  # questions on a page
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_text(folder / "report.html", "<title>the report</title>")
    return write_answers(folder, made_runs(folder / "runs"), "Three models")


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:  # noqa: F811
    """Opens a page; when the test ends, nothing may have stood in its console or gone to any host."""
    noise: list[str] = []
    opened = []

    def open_page(file: Path, hash: str = "", **options: Any) -> Any:
        page = browser.new_page(**options)
        opened.append(page)
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: noise.append(request.url) if not request.url.startswith("file:") else None)
        page.on("dialog", lambda dialog: noise.append(dialog.message))
        page.goto(file.as_uri() + hash)
        page.wait_for_selector("article, .nothing")
        return page

    yield open_page
    for page in opened:
        page.close()
    assert noise == []


def until(page: Any, condition: str) -> None:
    """Waits for a condition; Playwright's own way evaluates it within the page, whose policy forbids that."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def told(rows: Sequence[tuple[int, Prompt, str]]) -> str:
    """What the page says of so many answers."""
    questions = len({number for number, _, _ in rows})
    if not rows:
        return "No answer matches."
    return f"{len(rows)} answer{'s' * (len(rows) != 1)} to {questions} question{'s' * (questions != 1)}"


def matching(**wanted: Any) -> list[tuple[int, Prompt, str]]:
    """The answers that a filter should let through, by the records."""
    judge = wanted.get("judge", JUDGES[0])

    def fits(number: int, prompt: Prompt, model: str) -> bool:
        label, base = label_of(model, number, judge), label_of("base", number, judge)
        text = f"Answer {number} of {model} to {prompt.id}, Überall.".lower()
        given: Mapping[str, bool] = {
            "model": model == wanted.get("model"),
            "label": (label or "failed") == wanted.get("label"),
            "judge": True,
            "case": prompt.set == wanted.get("case"),
            "category": prompt.category == wanted.get("category"),
            "changed": label is not None and label != base,
            "disagree": label_of(model, number, JUDGES[0]) != label_of(model, number, JUDGES[1]),
            "q": str(wanted.get("q", "")).lower() in text or str(wanted.get("q", "")).lower() in prompt.question.lower(),
            "id": prompt.id == wanted.get("id"),
            "group": prompt.group_id == wanted.get("group"),
        }
        return all(given[name] for name in wanted)

    return [row for row in ROWS if fits(*row)]


def address(**wanted: Any) -> str:
    return "#" + "&".join(f"{name}={quote(str(value), safe='')}" for name, value in wanted.items())


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
        assert page.locator("article").evaluate_all("all => all.map(one => one.querySelectorAll('[aria-current]').length)") == list(
            marked.values()
        )
    assert page.locator(".nothing").count() == (0 if expected else 1)


def choices(page: Any, name: str) -> list[str]:
    return page.locator(f"#{name} option").all_inner_texts()[1:]


def test_each_choice_says_how_many_it_leads_to(visit: Open, report: Path) -> None:
    """Beside each choice stands the number of answers there would be, whatever else is set."""
    page = visit(report, address(model="npo", case="attacked"))
    assert choices(page, "model") == [f"{model} ({len(matching(model=model, case='attacked'))})" for model in MODELS]
    assert choices(page, "case") == [f"{case} ({len(matching(model='npo', case=case))})" for case in ("attacked", "mixed", "safe")]
    labels = {"complied": 0, "refused": 0, "degenerate": 0, "off_topic": 0, "score": 0, "failed": 0, "none": 0}
    labels |= {label: len(matching(model="npo", case="attacked", label=label)) for label in labels if label not in ("score", "none")}
    words = {"off_topic": "off topic", "score": "score only", "none": "not judged"}
    assert choices(page, "label") == [f"{words.get(label, label)} ({count})" for label, count in labels.items()]
    assert page.inner_text("#changed-count") == str(len(matching(model="npo", case="attacked", changed=1)))
    assert page.inner_text("#disagree-count") == str(len(matching(model="npo", case="attacked", disagree=1)))
    refused = visit(report, address(label="refused"))
    assert choices(refused, "judge") == [f"{judge} ({len(matching(label='refused', judge=judge))})" for judge in JUDGES]


def test_controls_write_the_address_and_back_brings_the_view_back(visit: Open, report: Path) -> None:
    page = visit(report)
    page.select_option("#model", label=f"npo ({len(matching(model='npo'))})")
    until(page, "location.hash == '#model=npo'")
    page.check("#changed")
    until(page, "location.hash == '#model=npo&changed=1'")
    page.locator("#q").press_sequentially("safe/1")
    until(page, "location.hash.endsWith('q=safe%2F1')")
    expected = told(matching(model="npo", changed=1, q="safe/1"))
    until(page, f"document.getElementById('count').innerText == {expected!r}")
    assert page.locator("mark").first.inner_text() == "safe/1"
    page.go_back()  # the word that was typed is one step
    until(page, "location.hash == '#model=npo&changed=1'")
    until(page, "document.getElementById('q').value == ''")
    assert page.inner_text("#count") == told(matching(model="npo", changed=1))
    page.go_back()
    until(page, "!document.getElementById('changed').checked")
    page.go_back()
    until(page, "document.getElementById('model').value == '-1'")
    page.go_forward()
    until(page, "document.getElementById('model').selectedIndex == 2")
    page.click("#clear")
    until(page, f"document.getElementById('count').innerText == {told(ROWS)!r}")
    assert page.locator("#clear").is_hidden()


def test_unknown_words_in_the_address_are_said(visit: Open, report: Path) -> None:
    page = visit(report, "#model=<script>alert(1)</script>&label=nice&case=safe&page=-4&sort=upside&what=ever&q=%E0%A4%A")
    assert page.inner_text("#unknown").startswith("Not in this report, and passed over: model “<script>alert(1)</script>”, label “nice”")
    assert page.locator("#case").evaluate("select => select.selectedOptions[0].text").startswith("safe")
    assert visit(report, "#case=safe&page=99").inner_text("[data-page] >> nth=0") == "page 2 of 2"


def test_pages_have_an_address(visit: Open, report: Path) -> None:
    page = visit(report)
    assert page.inner_text("[data-page] >> nth=0") == "page 1 of 4"
    page.click("[data-step='1'] >> nth=0")
    until(page, "location.hash == '#page=2'")
    assert page.locator("article").first.get_attribute("data-question") == str(SHOWN)
    page.select_option("#case", index=3)
    until(page, "location.hash == '#case=safe'")  # another filter begins at its first page
    page.go_back()
    until(page, "document.querySelector('article').dataset.question == '20'")
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
    verdicts = [f"{judge}: {str(label_of(model, number, judge)).replace('_', ' ')}" for model in MODELS for judge in JUDGES]
    assert cards.locator(".verdicts li").all_inner_texts() == verdicts
    assert set(cards.locator(".verdicts strong bdi").all_inner_texts()) == {JUDGES[0]}  # whose label the card has
    assert page.locator("article a >> nth=0").get_attribute("href") == "#case=attacked&group=attacked%2F0"
    page.click("article a >> nth=0")
    until(page, "document.querySelectorAll('article').length == 3")


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
    until(page, "location.hash == '#page=2'")
    until(page, "document.activeElement.dataset.question == '20'")
    page.keyboard.press("k")
    until(page, "document.activeElement.dataset.question == '19'")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("jrk/")  # letters, in a field
    until(page, "document.getElementById('count').innerText == 'No answer matches.'")
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
    until(page, "document.title == 'the report'")


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
    for selector in ("h1", ".text", ".label", ".changed", ".soft", "mark", "a", "kbd", ".model", ".pages button:disabled", ".pages button"):
        assert contrast(page, selector) >= 4.5, selector


def test_on_a_phone(visit: Open, report: Path) -> None:
    page = visit(report, "#case=safe", viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#q").is_hidden()
    assert page.inner_text("#filters summary") == "Filters (1 set)"
    page.click("#filters summary")
    page.fill("#q", "safe/2/0")
    until(page, "document.querySelectorAll('article').length == 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 900})
    until(page, "document.getElementById('filters').open")


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


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    "<img src=x onerror='window.hacked = 1'>",
    "javascript:window.hacked=1",
    "\u202egnisrever \u2066isolated",
    "{{ 7 * 7 }}",
    "line\u2028separator and tag \U000e0041 and \u200bnothing",
    "lone \ud800 surrogate and \x00 nul and \x1b[31m",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that others can write is hostile: names, files, texts, what judges said."""
    folder = tmp_path_factory.mktemp("hostile")
    bad = HOSTILE[0]
    prompts = [
        Prompt(id=f"{n}{text}", group_id=text, set=bad, kind="safe", question=text, reference=text, category=text, image=f"../{text}.png")
        for n, text in enumerate(HOSTILE)
    ]
    prompts.append(Prompt(id="long", group_id="long", set="long", kind="safe", question="Long?"))
    runs = {}
    for name in (bad, "\u202emodel", "javascript:window.hacked=1"):
        responses = [Response(prompt_id=p.id, text=p.question, finish_reason=p.question, error=p.question) for p in prompts[:-1]]
        responses.append(Response(prompt_id="long", text="word " * 200_000 + "the end"))
        verdicts = [Verdict(prompt_id=p.id, judge="keyword", label="refused", raw=p.question, error=p.question) for p in prompts]
        judges = {"keyword": verdicts, "<script>window.hacked = 1<": verdicts}
        runs[name] = put_run(folder / f"run{len(runs)}", prompts, responses, judges)
    return write_answers(folder, runs, "</title><script>window.hacked = 1</script>\u202e")


def test_hostile_texts_are_text(visit: Open, hostile: Path) -> None:
    source = hostile.read_text(encoding="utf-8")
    assert "<script>window.hacked" not in source
    assert "Content-Security-Policy" in source
    page = visit(hostile)
    text = page.locator("#list").text_content()
    made_visible = ["{{ 7 * 7 }}", "U+202Egnisrever U+2066isolated", "lineU+2028separator and tag U+E0041 and U+200Bnothing"]
    for wanted in [*HOSTILE[:5], *made_visible]:
        assert text.count(wanted) >= 9, wanted  # question, answers, references, verdicts
    assert "surrogate and \u2400 nul and \u241b[31m" in text
    assert not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\x00\x1b")
    assert "U+202Emodel" in page.locator("#model").inner_text()
    assert page.locator("#list script, #list img, #list a:not([href^='#'])").count() == 0
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator(".picture p").count() == len(HOSTILE)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_links_to_hostile_names_work(visit: Open, hostile: Path) -> None:
    page = visit(hostile, address(model=HOSTILE[0], case="long"))
    assert page.inner_text("#count") == "1 answer to 1 question"
    page = visit(hostile, address(category=HOSTILE[5]))
    assert page.inner_text("#count") == "3 answers to 1 question"


def test_an_answer_of_a_megabyte_is_cut_until_asked_for(visit: Open, hostile: Path) -> None:
    page = visit(hostile, "#id=long&q=the+end")
    assert page.inner_text("#count") == "3 answers to 1 question"
    card = page.locator(".answer").first
    assert len(card.inner_text()) < 2000
    assert card.locator(".more").inner_text() == "Show all 1,000,007 characters; what you search for is further on, too"
    card.locator(".more").click()
    assert len(card.inner_text()) > 1_000_000
    assert card.locator("mark").inner_text() == "the end"


def test_samples_failures_and_an_image_that_is_lost(visit: Open, tmp_path: Path) -> None:
    """Fifty samples of one answer; an answer that failed; an empty one; an image folder left behind."""
    prompts = [Prompt(id=i, group_id=i, set="safe", kind="safe", question=i) for i in ("many", "failed", "empty")]
    responses = [Response(prompt_id="many", sample=n, text=f"answer {n}", finish_reason="length" if n == 1 else "stop") for n in range(50)]
    responses += [Response(prompt_id="failed", error="timed out"), Response(prompt_id="empty", text="")]
    verdicts = [Verdict(prompt_id="many", sample=n, judge="rouge_l", score=n / 50) for n in range(50)]
    sampled = put_run(
        tmp_path / "a", prompts, responses, {"rouge_l": verdicts}, judge="rouge_l", generation={"temperature": 1.0}
    )  # fmt: skip
    moved = [verdict.model_copy(update={"score": 0.6}) for verdict in verdicts[:1]]
    single = put_run(tmp_path / "b", prompts[:1], responses[:1], {"rouge_l": moved}, judge="rouge_l")
    page = visit(write_answers(tmp_path / "out", {"a": sampled, "b": single}, "t"), "#id=many")
    assert page.inner_text("#count") == "51 answers to 1 question"
    assert page.locator(".answer").count() == 40
    page.click(".more")
    assert page.locator(".answer").count() == 51
    assert "sample 50" in page.locator(".answer").nth(49).inner_text()
    assert "Ended at the limit of its length." in page.locator(".answer").nth(1).inner_text()
    assert page.locator(".label").nth(25).inner_text() == "score 0.50"
    assert page.locator(".changed").all_inner_texts() == ["changed, was score 0.00"]
    failed = visit(tmp_path / "out" / "report" / "answers.html", "#label=failed")
    assert "No answer:" in failed.locator(".answer").inner_text()
    assert "timed out" in failed.locator(".answer").inner_text()
    assert "Not asked: b" in failed.locator("article").inner_text()
    empty = visit(tmp_path / "out" / "report" / "answers.html", "#label=none")
    assert "(an empty answer)" in empty.locator(".answer").inner_text()


def test_a_page_moved_without_its_images_says_so(browser: Any, report: Path, tmp_path: Path) -> None:  # noqa: F811
    moved = tmp_path / "answers.html"
    moved.write_bytes(report.read_bytes())
    page = browser.new_page()
    page.goto(moved.as_uri() + "#case=safe")
    page.wait_for_selector("text=No image: report/images/ is not beside this page")
    page.close()
