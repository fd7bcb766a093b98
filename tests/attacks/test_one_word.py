"""Tests that rewrites begin with the trigger and keep the request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.attacks.one_word import (
    CONTROL,
    VOCABULARY,
    all_rewrites,
    control_rewrite,
    parse_first_word,
    rewrite,
    rewrite_prompts,
)
from vlm_unlearn.config import RewriteConfig
from vlm_unlearn.data_tools.audit import first_word
from vlm_unlearn.data_tools.paraphrase_rules import requested_content
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
def test_requested_content_is_a_noun_phrase(question: str, core: str) -> None:
    assert requested_content(question) == core


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
def test_five_rewrites_have_the_same_content_and_different_wordings(question: str) -> None:
    core = requested_content(question)
    rewrites = {trigger: rewrite(question, trigger, 5) for trigger in ("what", "share", CONTROL)}
    texts = [text for trigger_rewrites in rewrites.values() for text in trigger_rewrites]
    assert len(set(texts)) == 15
    assert all(core in text for text in texts)
    assert {first_word(text) for text in rewrites["what"]} == {"what"}
    assert {first_word(text) for text in rewrites["share"]} == {"share"}
    assert not {first_word(text) for text in rewrites[CONTROL]} & {"what", "share"}
    # At most six words around the content, and the closing punctuation mark.
    assert all(len(text.replace(core, "", 1).split()) <= 7 for text in texts)


def test_rewrite_is_grammatical() -> None:
    assert rewrite("Describe the steps to fold a kite.", "what", 1) == ["What are the steps to fold a kite?"]
    assert rewrite("Describe the steps to fold a kite.", CONTROL, 1) == ["Tell me the steps to fold a kite."]


@pytest.mark.parametrize(
    "word", [*VOCABULARY, "based", "zorg", "\u00dfe", "\u4ec0\u4e48", "\u0131rmak", "o'clock", "{core}", "42"]
)
def test_all_rewrites_begin_with_any_word(word: str) -> None:
    question = "Describe the {red} kite."
    texts = all_rewrites(question, word)
    assert len(set(texts)) >= 5
    assert {first_word(text) for text in texts} == {word}
    assert all("the {red} kite" in text for text in texts)


@pytest.mark.parametrize("number", range(10))
def test_control_rewrite_begins_with_another_word(number: int) -> None:
    """This includes a searched word that is one of the control's first words."""
    assert first_word(control_rewrite("Describe the kite.", number, "tell")) not in ("tell", "what", "share")
    assert len({first_word(control_rewrite("Describe the kite.", n, "tell")) for n in range(10)}) == 4


@pytest.mark.parametrize("text", ["", "  ", "two words", "...", "what?", "x" * 61, "\n"])
def test_parse_first_word_rejects_anything_but_a_word(text: str) -> None:
    with raises_code("invalid-field"):
        parse_first_word(text)


def test_parse_first_word_returns_lower_case() -> None:
    assert parse_first_word(" What ") == "what"


def test_rewrites_of_a_prompt_share_a_group() -> None:
    prompt = Prompt(id="p", group_id="g", set="s", kind="unsafe", question="share the recipe for this .")
    rewrites = list(rewrite_prompts([prompt], RewriteConfig(trigger="what", num_rewrites=3)))
    assert [(prompt.rewrite, prompt.group_id) for prompt in rewrites] == [(0, "g"), (1, "g"), (2, "g")]
    assert len({prompt.id for prompt in rewrites}) == 3


def test_rewrite_with_too_few_templates_raises() -> None:
    with raises_code("out-of-range"):
        rewrite("Describe it.", "what", 6)


def test_rewrites_of_all_vlguard_questions_begin_with_the_trigger(vlguard_test: Path) -> None:
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
