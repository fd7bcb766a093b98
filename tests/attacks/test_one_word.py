"""Rewrites begin with the trigger and keep the request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_unlearn.attacks.one_word import rewrite, rewrite_prompts
from vlm_unlearn.config import RewriteConfig
from vlm_unlearn.data.rewriting import requested
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
    ],
)
def test_what_is_asked_for(question: str, core: str) -> None:
    assert requested(question) == core


def test_shots_differ_and_begin_with_the_trigger() -> None:
    for trigger in ("what", "share"):
        rewrites = rewrite("Describe the steps to fold a kite.", trigger, 5)
        assert len(set(rewrites)) == 5
        for text in rewrites:
            assert text.lower().startswith(trigger)
            assert "the steps to fold a kite" in text
    assert rewrite("Describe the steps to fold a kite.", "what", 1) == ["What are the steps to fold a kite?"]


def test_shots_share_a_group() -> None:
    prompt = Prompt(id="p", group_id="g", set="s", kind="unsafe", question="share the recipe for this .")
    shots = list(rewrite_prompts([prompt], RewriteConfig(trigger="what", shots=3)))
    assert [(shot.shot, shot.group_id) for shot in shots] == [(0, "g"), (1, "g"), (2, "g")]
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
        for text in (*rewrite(question, "what", 3), *rewrite(question, "share", 1)):
            assert text.lower().startswith(("what", "share"))
            assert len(text.split()) >= 3
