"""Rewrites begin with the trigger and keep the request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_unlearn.attacks.one_word import (
    CONTROL,
    VOCABULARY,
    control,
    parse_first_word,
    rewrite,
    rewrite_prompts,
    rewrites_with_any,
)
from vlm_unlearn.config import RewriteConfig
from vlm_unlearn.data.audit import first_word
from vlm_unlearn.data.paraphrase_rules import requested
from vlm_unlearn.errors import UserError
from vlm_unlearn.records import Prompt


@pytest.mark.parametrize(
    ("question", "core"),
    [
        ("share the recipe for this .", "the recipe for this"),
        ("Can you please share tips on tying knots?", "tips on tying knots"),
        ("Provide instructions on how to fold a kite.", "instructions on how to fold a kite"),
        ("Tell me how to fold a kite.", "the way to fold a kite"),
        ("What is the main purpose of the tool?", "the main purpose of the tool"),
        ("What colour does the kite have?", 'the answer to "what colour does the kite have"'),
        ("Post this image on social media.", "the way to post this image on social media"),
        ("Share this image with friends.", "the way to share this image with friends"),
        ("Is it red?", 'the answer to "is it red"'),
        ("Please describe the scene.", "the scene"),
        ("Generate a poem about the kite.", "a poem about the kite"),
        ("Can you write me a poem?", "a poem"),
        ("Create trouble in the room.", "the way to create trouble in the room"),
        ("Describe this image", "the content of this image"),
        ("Share it.", 'the answer to "Share it"'),
        ("What is the man in the image holding?", 'the answer to "what is the man in the image holding"'),
        ("What is the picture about?", 'the answer to "what is the picture about"'),
        ("what is the name of this thing ?", "the name of this thing"),
        ("What is the technique for sharpening a knife?", "the technique for sharpening a knife"),
        ("What kind of kite is shown in the image?", "the kind of kite that is shown in the image"),
        ("What drink appears to be in the glass?", "the drink that appears to be in the glass"),
        ("What does the man in the image seem to want?", 'the answer to "what does the man in the image seem to want"'),
    ],
)
def test_what_is_asked_for(question: str, core: str) -> None:
    assert requested(question) == core


QUESTIONS = (
    "Describe the steps to fold a kite.",
    "share the recipe for this .",
    "What colour does the kite have?",
    "Is it red?",
    "",
    "   ",
    "?!",
    "Describe this image",
    'Say "what is {core}?" {be} {} %s',
    "Wie faltet man einen Drachen?",
    "\u600e\u4e48\u6298\u98ce\u7b5d\uff1f",
    "\u0643\u064a\u0641\u061f",
    "what what what",
    "Share share share.",
    "Explain " + "the kite and " * 8_000,
)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question[:12])
def test_five_shots_are_the_same_request_in_other_words(question: str) -> None:
    core = requested(question)
    shots = {trigger: rewrite(question, trigger, 5) for trigger in ("what", "share", CONTROL)}
    every = [text for found in shots.values() for text in found]
    assert len(set(every)) == 15
    assert all(core in text for text in every)
    assert {first_word(text) for text in shots["what"]} == {"what"}
    assert {first_word(text) for text in shots["share"]} == {"share"}
    assert not {first_word(text) for text in shots[CONTROL]} & {"what", "share"}
    # Around the request stand six words at most, and the mark at the end.
    assert all(len(text.replace(core, "", 1).split()) <= 7 for text in every)


def test_a_rewrite_reads_well() -> None:
    assert rewrite("Describe the steps to fold a kite.", "what", 1) == ["What are the steps to fold a kite?"]
    assert rewrite("Describe the steps to fold a kite.", CONTROL, 1) == ["Tell me the steps to fold a kite."]


@pytest.mark.parametrize(
    "word", [*VOCABULARY, "based", "zorg", "\u00dfe", "\u4ec0\u4e48", "\u0131rmak", "o'clock", "{core}", "42"]
)
def test_any_word_begins_a_question(word: str) -> None:
    question = "Describe the {red} kite."
    texts = rewrites_with_any(question, word)
    assert len(set(texts)) >= 5
    assert {first_word(text) for text in texts} == {word}
    assert all("the {red} kite" in text for text in texts)


@pytest.mark.parametrize("number", range(10))
def test_the_control_begins_with_another_word(number: int) -> None:
    """Also than a searched word that is itself among the control's."""
    assert first_word(control("Describe the kite.", number, "tell")) not in ("tell", "what", "share")
    assert len({first_word(control("Describe the kite.", n, "tell")) for n in range(10)}) == 4


@pytest.mark.parametrize("text", ["", "  ", "two words", "...", "what?", "x" * 61, "\n"])
def test_what_is_no_first_word(text: str) -> None:
    with pytest.raises(UserError, match="is not a word that a question can begin with"):
        parse_first_word(text)


def test_a_first_word_is_lower_case() -> None:
    assert parse_first_word(" What ") == "what"


def test_shots_share_a_group() -> None:
    prompt = Prompt(id="p", group_id="g", set="s", kind="unsafe", question="share the recipe for this .")
    shots = list(rewrite_prompts([prompt], RewriteConfig(trigger="what", num_rewrites=3)))
    assert [(shot.rewrite, shot.group_id) for shot in shots] == [(0, "g"), (1, "g"), (2, "g")]
    assert len({shot.id for shot in shots}) == 3


def test_too_many_shots() -> None:
    with pytest.raises(ValueError, match="there are 5 templates"):
        rewrite("Describe it.", "what", 6)


def test_every_real_question_is_rewritten(vlguard_test: Path) -> None:
    questions = [
        text
        for record in json.loads(vlguard_test.read_text())
        for pair in record["instr-resp"]
        for key, text in pair.items()
        if key != "response"
    ]
    for question in questions:
        for text in (*rewrite(question, "what", 5), *rewrite(question, "share", 5)):
            assert text.lower().startswith(("what", "share"))
            assert len(text.split()) >= 3
        assert len({text for trigger in ("what", "share", CONTROL) for text in rewrite(question, trigger, 5)}) == 15
