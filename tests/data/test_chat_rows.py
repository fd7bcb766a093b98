"""Rows with chat messages give the same conversation, or the same error, in training and in evaluation."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import Turn
from vlm_unlearn.data.images import open_image
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.rows import read_rows


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (9, 8, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}
SYSTEM = {"role": "system", "content": "Be brief."}
ROUND = [user([IMAGE, text("Who?")]), assistant("Ann.")]
HUMAN, GPT = {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A kite."}


def train(row: dict[str, Any]) -> UnlearningDataset:
    return UnlearningDataset.from_datasets({"forget": [row], "retain": [{"question": "Q?", "answer": "A."}]})


def error_of(read: Any, row: dict[str, Any]) -> tuple[str, str | None]:
    with pytest.raises(UserError) as caught:
        read(row)
    return caught.value.code, caught.value.field


@pytest.mark.parametrize(
    ("row", "rounds", "system"),
    [
        ({"messages": [user("What?"), assistant("A kite.")]}, [("What?", "A kite.")], None),
        ({"messages": (user("What?"), assistant("A kite."))}, [("What?", "A kite.")], None),
        ({"messages": [user("<image>\nWhat?"), assistant("A kite.")], "images": [png()]}, [("What?", "A kite.")], None),
        ({"messages": [user("What?\n<image>"), assistant("A kite.")], "image": png()}, [("What?", "A kite.")], None),
        (
            {"messages": [user([text("In "), IMAGE, text("it?")]), assistant([text("A kite.")])], "images": [png()]},
            [("In it?", "A kite.")],
            None,
        ),
        (
            {"messages": [user([{**IMAGE, "image": png()}, text("What?")]), assistant("A kite.")], "images": None},
            [("What?", "A kite.")],
            None,
        ),
        (
            {"messages": [SYSTEM, *ROUND, user("What?"), assistant("A kite.")], "images": [png()]},
            [("Who?", "Ann."), ("What?", "A kite.")],
            "Be brief.",
        ),
        (
            {"conversations": [HUMAN, GPT], "image": png(), "system": "Be brief."},
            [("What?", "A kite.")],
            "Be brief.",
        ),
        (
            {"question": "What?", "answer": "A kite.", "history": [{"question": "Who?", "answer": "Ann."}]},
            [("Who?", "Ann."), ("What?", "A kite.")],
            None,
        ),
    ],
)
def test_training_and_evaluation_read_the_same_conversation(
    row: dict[str, Any], rounds: list[tuple[str, str]], system: str | None
) -> None:
    data, prompts = train(row), read_rows([row])
    (example,), (prompt,) = data["forget"], prompts.prompts
    history = [(turn.question, turn.answer) for turn in example.history]
    assert (*history, (example.question, example.answer)) == tuple(rounds)
    assert (prompt.history, prompt.question, prompt.reference) == (example.history, example.question, example.answer)
    assert example.system == prompt.system == system
    turns = Turn.of_prompt(prompt, None), replace(Turn.of_example(example, None), answer=None, loss_on="all_answers")
    assert turns[0] == replace(turns[1], id="0")  # the place of the image too
    images = data.image(example), prompts.image(prompt)
    has_image = any(row.get(name) for name in ("image", "images")) or "image" in str(row)
    pixels = [None if image is None else open_image(image).tobytes() for image in images]
    assert pixels == [Image.open(io.BytesIO(png())).tobytes() if has_image else None] * 2


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"messages": "What?"}, ("invalid-field", "messages")),
        ({"messages": []}, ("invalid-field", "messages")),
        ({"messages": [3]}, ("invalid-field", "messages[0]")),
        ({"messages": [SYSTEM]}, ("invalid-field", "messages")),
        ({"messages": [assistant("A.")]}, ("invalid-field", "messages")),
        ({"messages": [user("What?"), user("Who?"), assistant("A.")]}, ("invalid-field", "messages")),
        ({"messages": [user("What?"), {"role": "tool", "content": "x"}]}, ("invalid-field", "messages")),
        ({"messages": [user("What?"), assistant("A."), SYSTEM]}, ("invalid-field", "messages")),
        ({"messages": [{"content": "What?"}, assistant("A.")]}, ("missing-field", "messages[0].role")),
        ({"messages": [user(None), assistant("A.")]}, ("invalid-field", "messages[0].content")),
        ({"messages": [user(" "), assistant("A.")]}, ("empty-field", "messages[0].content")),
        ({"messages": [user("What?"), assistant("")]}, ("empty-field", "messages[1].content")),
        (
            {"messages": [user([{"type": "video"}]), assistant("A.")]},
            ("unsupported-setting", "messages[0].content[0].type"),
        ),
        ({"messages": [user("<image>"), assistant("A.")], "images": [png()]}, ("empty-field", "messages[0].content")),
        ({"messages": [user("What?"), assistant("<image>A.")]}, ("placeholder-in-text", "messages[1].content")),
        (
            {"messages": [*ROUND, user("<image>What?"), assistant("A.")], "images": [png()]},
            ("unsupported-setting", "messages[2].content"),
        ),
        (
            {"messages": [user("<image><image>What?"), assistant("A.")], "images": [png()]},
            ("unsupported-setting", "messages[0].content"),
        ),
        ({"messages": ROUND}, ("missing-field", "images")),
        ({"messages": ROUND, "images": []}, ("missing-field", "images")),
        ({"messages": ROUND, "images": [png(), png()]}, ("unsupported-setting", "images")),
        ({"messages": ROUND, "images": [png()], "image": png()}, ("conflicting-settings", "images")),
        (
            {"messages": [user([{**IMAGE, "image": png()}, text("What?")]), assistant("A.")], "images": [png()]},
            ("conflicting-settings", "images"),
        ),
        ({"messages": ROUND, "images": [b"no image"]}, ("invalid-image", "images[0]")),
        ({"question": "", "answer": "A."}, ("empty-field", "question")),
        ({"question": 3, "answer": "A."}, ("invalid-field", "question")),
        ({"question": "What?", "answer": "A.", "images": [png(), png()]}, ("unsupported-setting", "images")),
    ],
)
def test_training_and_evaluation_reject_the_same_rows(row: dict[str, Any], error: tuple[str, str]) -> None:
    def open_training_image(row: dict[str, Any]) -> None:
        data = train(row)
        open_image(data.image(data["forget"][0]))  # type: ignore[arg-type]  # broken images fail when they are used

    assert error_of(lambda row: read_rows([row]), row) == error
    code, field = error_of(open_training_image, row)
    assert (code, field or error[1]) == error


def test_only_training_needs_an_answer() -> None:
    row = {"messages": [*ROUND, user("What?")], "images": [png()]}
    (prompt,) = read_rows([row]).prompts
    assert (len(prompt.history), prompt.question, prompt.reference) == (1, "What?", None)
    assert error_of(train, row) == ("invalid-field", "messages")
