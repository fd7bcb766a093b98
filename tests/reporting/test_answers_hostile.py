"""The page of all answers shows hostile, huge, failed and missing things as what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from answer_runs import made_runs, put_run
from answer_visits import Open, address
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.reporting.answers.answers_page import write_answers

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


def test_hostile_texts_are_text(visit: Open, hostile: Path) -> None:
    source = hostile.read_text(encoding="utf-8")
    assert "<script>window.hacked" not in source
    assert "Content-Security-Policy" in source
    page = visit(hostile)
    text = page.locator("#list").text_content()
    made_visible = [
        "{{ 7 * 7 }}",
        "U+202Egnisrever U+2066isolated",
        "lineU+2028separator and tag U+E0041 and U+200Bnothing",
    ]
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


NATIVE = (
    "constructor",
    "toString",
    "valueOf",
    "__proto__",
    "none",
    "score",
    "off_topic",
)  # names that mean something to the script


def test_names_that_the_script_knows_are_names(visit: Open, tmp_path: Path) -> None:
    prompts = [Prompt(id=name, group_id=name, set=name, kind="safe", question=name, category=name) for name in NATIVE]
    responses = [Response(prompt_id=name, text=name) for name in NATIVE]
    judges = {name: [Verdict(prompt_id=p.id, judge=name, label="off_topic") for p in prompts] for name in NATIVE}
    page = visit(
        write_answers(
            tmp_path, {name: put_run(tmp_path / name, prompts, responses, judges) for name in NATIVE[:4]}, "t"
        )
    )
    for name in NATIVE:
        for list_of in ("case", "category"):
            assert page.locator(f"#{list_of} option", has_text=f"{name} (4)").count() == 1
    assert page.locator("#model option", has_text="constructor (7)").count() == 1
    assert page.locator("#judge option", has_text="valueOf (28)").count() == 1
    assert "not judged (28)" in page.locator("#label").inner_text()
    page = visit(
        tmp_path / "report" / "answers.html", address(case=["none", "score"], sort="evil", beside="constructor")
    )
    assert page.locator("#case option[value=several]").inner_text() == "none or score"
    assert page.inner_text("#unknown") == "Not in this report, and passed over: sort “evil”, beside “constructor”."
    assert "sort" not in page.evaluate("filterHash(filter)")


def test_without_script_there_are_no_controls(browser: Any, tmp_path: Path) -> None:
    report = write_answers(tmp_path / "out", made_runs(tmp_path / "runs"), "t")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("noscript p").is_visible()
    assert [button for button in page.locator("button, select, input").all() if button.is_visible()] == []
    context.close()


def test_paper_says_which_page_it_holds(visit: Open, tmp_path: Path) -> None:
    page = visit(write_answers(tmp_path / "out", made_runs(tmp_path / "runs"), "t"), "#page=2")
    assert not page.locator(".only-print").is_visible()
    page.emulate_media(media="print")
    assert page.locator(".only-print").inner_text() == "Printed is page 2 of 4."


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
    assert "Ended at the limit of its length." in page.locator(".answer").nth(1).inner_text()
    assert page.locator(".label").nth(25).inner_text() == "score 0.50"
    assert page.locator(".changed").all_inner_texts() == ["changed, was score 0.00"]
    failed = visit(tmp_path / "out" / "report" / "answers.html", "#label=failed")
    assert "No answer:" in failed.locator(".answer").inner_text()
    assert "timed out" in failed.locator(".answer").inner_text()
    assert "Not asked: b" in failed.locator("article").inner_text()
    empty = visit(tmp_path / "out" / "report" / "answers.html", "#label=none")
    assert "(an empty answer)" in empty.locator(".answer").inner_text()


def test_a_page_moved_without_its_images_says_so(browser: Any, tmp_path: Path) -> None:
    report = write_answers(tmp_path / "out", made_runs(tmp_path / "runs"), "t")
    moved = tmp_path / "answers.html"
    moved.write_bytes(report.read_bytes())
    page = browser.new_page()
    page.goto(moved.as_uri() + "#case=safe")
    said = page.wait_for_selector("text=No image: report/images/ is not beside this page")
    assert said.is_visible()
    page.close()
