"""The answers page in a browser with hostile, very long, failed and missing content."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from answer_runs import make_example_runs, put_run
from answer_visits import Open, address, go
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.reporting.answers.answers_page import write_answers

pytestmark = pytest.mark.browser
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    "<!-- <script src=x",
    "<img src=x onerror='window.hacked = 1'>",
    "javascript:window.hacked=1",
    "\u202egnisrever \u2066isolated",
    "{{ 7 * 7 }}",
    "line\u2028separator and tag \U000e0041 and \u200bnothing",
    "lone \ud800 surrogate and \x00 nul and \x1b[31m",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page in which everything from outside is hostile: names, files, texts and judges' replies."""
    folder = tmp_path_factory.mktemp("hostile")
    bad = HOSTILE[0]
    prompts = [
        Prompt(
            id=f"{n}{text}",
            group_id=text,
            set=bad,
            kind="safe",
            question=text,
            reference=text,
            category=text,
            image=f"../{text}.png",
        )
        for n, text in enumerate(HOSTILE)
    ]
    prompts.append(Prompt(id="long", group_id="long", set="long", kind="safe", question="Long?"))
    runs = {}
    for name in (bad, "\u202emodel", "javascript:window.hacked=1"):
        responses = [
            Response(prompt_id=p.id, text=p.question, finish_reason=p.question, error=p.question) for p in prompts[:-1]
        ]
        responses.append(Response(prompt_id="long", text="word " * 200_000 + "the end"))
        verdicts = [
            Verdict(prompt_id=p.id, judge="keyword", label="refused", raw=p.question, error=p.question) for p in prompts
        ]
        judges = {"keyword": verdicts, "<script>window.hacked = 1<": verdicts}
        runs[name] = put_run(folder / f"run{len(runs)}", prompts, responses, judges)
    return write_answers(folder, runs, "</title><script>window.hacked = 1</script>\u202e")


def test_data_of_the_page_contains_no_markup(hostile: Path) -> None:
    """`<!--<script ` in a script element would hide the end tag of that element from the HTML parser."""
    page = hostile.read_text(encoding="utf-8")
    blocks = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, flags=re.DOTALL)
    assert blocks
    assert not [block for block in blocks if set(block) & set("<>&")]


def test_hostile_texts_are_shown_as_text(visit: Open, hostile: Path) -> None:
    source = hostile.read_text(encoding="utf-8")
    assert "<script>window.hacked" not in source
    assert "Content-Security-Policy" in source
    page = visit(hostile)
    text = page.locator("#list").text_content()
    visible = [
        "{{ 7 * 7 }}",
        "U+202Egnisrever U+2066isolated",
        "lineU+2028separator and tag U+E0041 and U+200Bnothing",
    ]
    for expected in [*HOSTILE[:5], *visible]:
        assert text.count(expected) >= 9, expected  # question, answers, references, verdicts
    assert "surrogate and \u2400 nul and \u241b[31m" in text
    assert not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\x00\x1b")
    assert "U+202Emodel" in page.locator("#model").inner_text()
    assert page.locator("#list script, #list img, #list a:not([href^='#'])").count() == 0
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator(".picture p").count() == len(HOSTILE)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_hostile_names_in_the_address_select_answers(visit: Open, hostile: Path) -> None:
    page = visit(hostile, address(model=HOSTILE[0], case="long"))
    assert page.inner_text("#count") == "1 answer to 1 question"
    go(page, address(category=HOSTILE[5]))
    assert page.inner_text("#count") == "3 answers to 1 question"


# Names of JavaScript properties, and names that the page's script uses itself.
RESERVED = ("constructor", "toString", "valueOf", "__proto__", "none", "score", "off_topic")


def test_reserved_names_are_ordinary_names(visit: Open, tmp_path: Path) -> None:
    prompts = [Prompt(id=name, group_id=name, set=name, kind="safe", question=name, category=name) for name in RESERVED]
    responses = [Response(prompt_id=name, text=name) for name in RESERVED]
    judges = {name: [Verdict(prompt_id=p.id, judge=name, label="off_topic") for p in prompts] for name in RESERVED}
    page = visit(
        write_answers(
            tmp_path, {name: put_run(tmp_path / name, prompts, responses, judges) for name in RESERVED[:4]}, "t"
        )
    )
    for name in RESERVED:
        for control in ("case", "category"):
            assert page.locator(f"#{control} option", has_text=f"{name} (4)").count() == 1
    assert page.locator("#model option", has_text="constructor (7)").count() == 1
    assert page.locator("#judge option", has_text="valueOf (28)").count() == 1
    assert "not judged (28)" in page.locator("#label").inner_text()
    go(page, address(case=["none", "score"], sort="evil", beside="constructor"))
    assert page.locator("#case option[value=several]").inner_text() == "none or score"
    assert page.inner_text("#unknown").endswith(": sort “evil”, beside “constructor”.")
    assert "sort" not in page.evaluate("filterHash(filter)")


def test_page_without_javascript_or_images_says_so(browser: Any, tmp_path: Path) -> None:
    report = write_answers(tmp_path / "out", make_example_runs(tmp_path / "runs"), "t")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("noscript p").is_visible()
    assert [control for control in page.locator("button, select, input").all() if control.is_visible()] == []
    context.close()
    moved = tmp_path / "answers.html"
    moved.write_bytes(report.read_bytes())
    page = browser.new_page()
    page.goto(moved.as_uri() + "#case=safe")
    assert page.wait_for_selector(".picture p").inner_text().startswith("No image: ")
    page.close()


def test_long_answer_is_shortened_until_expanded(visit: Open, hostile: Path) -> None:
    page = visit(hostile, "#id=long&q=the+end")
    assert page.inner_text("#count") == "3 answers to 1 question"
    card = page.locator(".answer").first
    assert len(card.inner_text()) < 2000
    assert "1,000,007 characters" in card.locator(".more").inner_text()
    assert "matches" in card.locator(".more").inner_text()  # the query occurs below
    card.locator(".more").click()
    assert len(card.inner_text()) > 1_000_000
    assert card.locator("mark").inner_text() == "the end"


def test_samples_failed_and_empty_answers_are_shown(visit: Open, tmp_path: Path) -> None:
    """Fifty samples of one answer, a failed answer and an empty answer."""
    prompts = [Prompt(id=i, group_id=i, set="safe", kind="safe", question=i) for i in ("many", "failed", "empty")]
    responses = [
        Response(prompt_id="many", sample=n, text=f"answer {n}", finish_reason="length" if n == 1 else "stop")
        for n in range(50)
    ]
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
    assert "maximum number of tokens" in page.locator(".answer").nth(1).inner_text()
    assert page.locator(".label").nth(25).inner_text() == "score 0.50"
    assert page.locator(".changed").all_inner_texts() == ["changed from score 0.00"]
    go(page, "#label=failed")
    assert "No answer:" in page.locator(".answer").inner_text()
    assert "timed out" in page.locator(".answer").inner_text()
    assert "Not asked: b" in page.locator("article").inner_text()
    go(page, "#label=none")
    assert "(empty answer)" in page.locator(".answer").inner_text()
