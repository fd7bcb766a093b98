"""`chat`: one question to several models, from an option, a pipe or a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from helpers import command, error_code, run_in_process
from stub_server import stub_server
from vlm_unlearn.cli.chat import _answer_text, _print_answers
from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.generation.conversation import Conversation
from vlm_unlearn.generation.hf import generate_responses
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.records import Prompt, Response

# A backend whose models answer with the number of rounds, the image and the system message of the prompt.
BACKEND = """
from vlm_unlearn.records import Response

class Echo:
    def __init__(self, model, config):
        if model == "gone":
            from vlm_unlearn.errors import UserError
            raise UserError("no such model", code="model-not-found", file=model)
        self.model, self.config = model, config

    def identity(self):
        return {"model": self.model, "generation": {}}

    def make_batches(self, requests):
        return [[request] for request in requests]

    def check_available(self):
        pass

    def run(self, batches, on_responses):
        for (request,) in batches:
            prompt = request.prompt
            rounds = " ".join(f"{turn.question}={turn.answer};" for turn in prompt.history)
            text = f"{self.model}|{rounds}|{prompt.question}|{prompt.image}|{prompt.system}|{self.config.temperature}"
            if prompt.question == "fail":
                on_responses([Response(prompt_id=prompt.id, error="broken \\x1b[31m")])
            else:
                text = text.replace("ESC", "\\x1b[2J")
                on_responses([Response(prompt_id=prompt.id, text=text, finish_reason="stop")])

    def run_one_by_one(self, requests):
        return iter(())
"""


@pytest.fixture
def echo(tmp_path: Path) -> str:
    """The override that selects the backend."""
    (tmp_path / "echo.py").write_text(BACKEND)
    return f"generation.backend={tmp_path}/echo.py:Echo"


@pytest.fixture
def image(world: Path) -> Path:
    return next(iter(sorted((world / "vlguard" / "test").rglob("*.png"))))


def typed(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    raw = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))


def test_answers_are_those_of_an_evaluation(tiny_model: Path, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    arguments = ["chat", tiny_model, other, "--image", image, "--question", "what is it ?"]
    settings = {"max_new_tokens": 7, "temperature": 0.9, "seed": 3}
    done = run_in_process(*arguments, *(f"generation.{key}={value}" for key, value in settings.items()), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["question"] == "what is it ?"
    assert document["image"] == str(image)
    prompt = Prompt(id="1", group_id="1", set="chat", kind="unsafe", image=image.name, question="what is it ?")
    config = GenerationConfig(**settings)
    model, processor = load_model(tiny_model, "fp32").eval(), load_processor(tiny_model)
    ((response,),) = generate_responses(model, processor, [prompt], {"chat": image.parent}, config)
    expected = {"answer": response.text, "finish_reason": response.finish_reason, "error": None}
    assert document["answers"] == [{"model": str(name), **expected} for name in (tiny_model, other)]


def test_question_prints_one_answer_after_the_other_without_control_sequences(echo: str) -> None:
    done = run_in_process("chat", "a", "b", echo, "--question", "ESC what?", "system_prompt=be kind")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("a: a||\\x1b[2J what?|None|be kind|0.0\nb: b||\\x1b[2J what?|None|be kind|0.0\n")
    assert run_in_process("chat", "a", echo, "--question", "x").stdout == "a||x|None|None|0.0\n"


def test_question_that_no_model_answers_fails(echo: str) -> None:
    done = run_in_process("chat", "a", "b", echo, "--question", "fail", "--json")
    assert (done.returncode, error_code(done)) == (1, "no-answers")
    assert [answer["error"] for answer in json.loads(done.stdout)["answers"]] == ["broken \x1b[31m"] * 2
    done = run_in_process("chat", "a", echo, "--question", "fail")
    assert "\x1b" not in done.stdout + done.stderr


def test_piped_questions_and_commands(echo: str, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["\ufefffirst", "", f"/image {image}", "second\r", "/image", "third", "/quit", "never"]
    typed(monkeypatch, "\n".join(lines))
    done = run_in_process("chat", "a", "b", echo)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{model}: {model}||{question}|{name}|None|0.0"
        for question, name in (("first", None), ("second", image.name), ("third", None))
        for model in "ab"
    ]
    assert done.stderr == ""


def test_each_model_continues_its_own_rounds(echo: str, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, b"one\nfail\ntwo\n/new\nthree\n\xff four")
    done = run_in_process("chat", "a", "b", echo, "--multi-turn", "--image", image)
    lines = done.stdout.splitlines()
    answer = f"||one|{image.name}|None|0.0"
    assert lines[:2] == [f"a: a{answer}", f"b: b{answer}"]
    assert lines[2].startswith("a: (no answer: broken \\x1b[31m")
    assert lines[4:6] == [f"{name}: {name}|one={name}{answer};|two|{image.name}|None|0.0" for name in "ab"]
    assert lines[6] == f"a: a||three|{image.name}|None|0.0"
    assert "|\ufffd four|" in lines[8]


def test_pipe_ends_at_the_first_error(echo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question without its image would get another answer."""
    (tmp_path / "text.png").write_text("no image")
    cases = {
        f"/image {tmp_path}/gone.png\nwhat?": "image-not-found",
        f"/image {tmp_path}/text.png\nwhat?": "invalid-image",
        "/imag x\nwhat?": "unknown-command",
        "x" * 100_001: "out-of-range",
    }
    for text, code in cases.items():
        typed(monkeypatch, text)
        done = run_in_process("chat", "a", echo)
        assert (done.returncode, error_code(done)) == (2, code), done.stderr
        assert done.stdout == ""


def test_wrong_requests_are_rejected(echo: str, tmp_path: Path) -> None:
    cases = [
        (["a", echo, "--json"], "conflicting-settings"),
        ([echo, "--question", "x"], "missing-setting"),
        (["a", "a", echo, "--question", "x"], "duplicate-id"),
        (["a", echo, "--question", "  "], "empty-field"),
        (["a", echo, "--question", "x", "--image", tmp_path / "gone.png"], "image-not-found"),
        (["a", "gone", echo, "--question", "x"], "model-not-found"),
        ([tmp_path / "gone", "--question", "x"], "model-not-found"),
        (["a", echo, "generaton.seed=1", "--question", "x"], "unknown-key"),
        (["a", echo, "generation.max_new_tokens=0", "--question", "x"], "invalid-field"),
    ]
    for arguments, code in cases:
        done = run_in_process("chat", *arguments)
        assert (done.returncode, error_code(done)) == (2, code), done.stderr
        assert done.stdout == ""


def test_models_on_a_server(image: Path) -> None:
    with stub_server(lambda text: f"re: {text}") as stub:
        options = ["generation.backend=openai", f"generation.server={stub.url}", "--image", image]
        done = run_in_process("chat", "base", "npo", *options, "--question", "what?")
        assert [body["model"] for body in stub.bodies] == ["base", "npo"]
    assert done.stdout == "base: re: what?\nnpo: re: what?\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a   b\nc"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("one\rtwo", "one\ntwo"),
        ("\u202eevil\x9b1m", "\\u202eevil\\x9b1m"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("", "(empty answer)"),
    ],
)
def test_answers_are_escaped(text: str, shown: str) -> None:
    assert _answer_text(Response(prompt_id="1", text=text, finish_reason="stop")) == shown


def test_truncated_answer_is_marked() -> None:
    assert _answer_text(Response(prompt_id="1", text="x", finish_reason="length")).startswith("x …")


@pytest.mark.parametrize(("width", "side_by_side"), [(100, True), (60, False)])
def test_wide_terminal_shows_answers_side_by_side(width: int, side_by_side: bool) -> None:
    out = io.StringIO()
    responses = [Response(prompt_id="1", text=text) for text in ("[red]left", "right")]
    _print_answers(Console(file=out, force_terminal=True, width=width, color_system=None), ["base", "npo"], responses)
    lines = out.getvalue().splitlines()
    assert any("[red]left" in line and "right" in line for line in lines) == side_by_side
    assert any("base" in line and "npo" in line for line in lines) == side_by_side


def test_conversation_drops_an_empty_answer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(str(tiny_model), GenerationConfig(max_new_tokens=3), keeps_rounds=True)
    monkeypatch.setattr(
        "vlm_unlearn.generation.hf.generate_texts", lambda model, processor, turns, *_: [("", "stop") for _ in turns]
    )
    assert conversation.ask("what is it ?").text == ""
    assert conversation.rounds == []


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(180)
def test_terminal_prompts_and_survives_a_wrong_command(echo: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("chat", "a", "b", echo),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    output, end = b"", time.monotonic() + 120
    steps = [b"/image gone.png\n", b"first\n", b"/quit\n"]
    prompts = 0
    try:
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    output += os.read(ours, 65536)
                except OSError:  # the terminal is closed
                    break
            if output.count(b"> ") > prompts and steps:
                prompts = output.count(b"> ")
                os.write(ours, steps.pop(0))
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        os.close(ours)
    text = output.decode()
    assert "[image-not-found]" in text
    assert "a||first|None" in text
    assert any("a||first" in line and "b||first" in line for line in text.splitlines())
