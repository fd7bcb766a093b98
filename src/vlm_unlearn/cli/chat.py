"""``vlm-unlearn chat``: asks models questions in the terminal, and shows their answers side by side."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import JSON_OPTION, fail_line, print_json, quiet_libraries, result_console, status_console
from vlm_unlearn.errors import RunError, UserError, printable, quoted

if TYPE_CHECKING:
    from rich.console import Console

    from vlm_unlearn.config import ChatConfig
    from vlm_unlearn.generation.conversation import Conversation
    from vlm_unlearn.records import Response

MAX_QUESTION = 100_000  # characters of a line on standard input
MIN_COLUMN = 30  # characters of an answer's column. On a narrower terminal the answers follow each other
COMMANDS = (
    "/image PATH asks about another image, /image alone about none, /new starts a new conversation, /quit ends. "
    "A question that starts with / needs a space before it."
)
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def chat(
    models: list[str] = typer.Argument(
        ...,
        metavar="MODEL...",
        help="Training runs, models, adapters or hub names. Keys of evaluate may follow: generation.temperature=1.",
    ),
    image: Path = typer.Option(None, "--image", help="The image to ask about. Default: text only."),
    question: str = typer.Option(
        None, "--question", help="Ask one question and exit. Default: questions are read from standard input."
    ),
    multi_turn: bool = typer.Option(
        False, "--multi-turn", help="Each question follows the earlier ones, with the answers of each model."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Asks models the same question, such as a model before and after unlearning, and prints their answers.

    Without --question it reads one question per line, from the terminal or a pipe. /image PATH changes the image, and
    /quit ends. The settings are those of evaluate: generation.max_new_tokens=64, system_prompt="...".

    Example:

      vlm-unlearn chat demo/runs/base demo/runs/npo --image picture.png --question "what is it ?"

      vlm-unlearn chat llava-hf/llava-1.5-7b-hf runs/npo --image picture.png
    """
    if as_json and question is None:
        problem = "needs --question: it prints one document. Without --question, answers are printed as text."
        raise UserError(problem, code="conflicting-settings", field="--json")
    names, config = _parse(models)
    with status_console().status("loading transformers"):
        from vlm_unlearn.generation.conversation import Conversation, validate_image

        quiet_libraries()
    if image is not None:
        validate_image(image)
    if question is not None:
        _ask_once(names, config, question, image, as_json)
        return
    conversations = [
        Conversation(name, config.generation, config.system_prompt, keeps_rounds=multi_turn) for name in names
    ]
    _ask_lines(conversations, image)


def _parse(arguments: Sequence[str]) -> tuple[list[str], ChatConfig]:
    """Returns the models and the settings among the arguments.

    Raises:
        UserError: There is no model, one occurs twice, or a setting is invalid.
    """
    from vlm_unlearn.config import ChatConfig, apply_overrides, validate

    overrides = [text for text in arguments if _OVERRIDE.match(text) and not Path(text).exists()]
    names = [text for text in arguments if text not in overrides]
    if not names:
        raise UserError("there is no model. Pass one or more.", code="missing-setting", field="MODEL")
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise UserError(f"{quoted(duplicate)} is passed twice. Pass it once.", code="duplicate-id", field="MODEL")
    return names, validate(ChatConfig, apply_overrides({}, overrides, ChatConfig), "chat")


def _ask_once(names: Sequence[str], config: ChatConfig, question: str, image: Path | None, as_json: bool) -> None:
    """Asks one model after the other, so that only one is in memory, and prints the answers.

    Raises:
        UserError: The question is empty, or a model does not exist.
        RunError: No model has answered.
    """
    from vlm_unlearn.generation.conversation import Conversation
    from vlm_unlearn.store import replace_surrogates

    question = replace_surrogates(question)
    if not question.strip():
        raise UserError("the question is empty", code="empty-field", field="--question")
    conversations = [Conversation(name, config.generation, config.system_prompt) for name in names]
    responses = []
    while conversations:
        conversation = conversations.pop(0)
        with status_console().status(f"asking {printable(conversation.model)}", spinner="line"):
            responses.append(conversation.ask(question, image))
        del conversation  # frees its memory
    if as_json:
        answers = [
            {"model": name, "answer": response.text, "finish_reason": response.finish_reason, "error": response.error}
            for name, response in zip(names, responses, strict=True)
        ]
        print_json({"question": question, "image": None if image is None else str(image), "answers": answers})
    else:
        _print_answers(result_console(), names, responses)
    if all(response.text is None for response in responses):
        raise RunError(f"no model has answered ({responses[0].error})", code="no-answers")


def _ask_lines(conversations: Sequence[Conversation], image: Path | None) -> None:
    """Asks the questions that are read from standard input, and follows the commands among them.

    On a terminal an error is printed and the next line is read. From a pipe it ends the command.
    """
    from vlm_unlearn.store import replace_surrogates

    interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    console, status = result_console(), status_console()
    if interactive:
        status.print(printable(COMMANDS), markup=False, highlight=False)
    for line in _lines(interactive):
        try:
            if line.startswith("/"):
                command, _, value = line.partition(" ")
                if command in ("/quit", "/exit"):
                    return
                image = _follow(command, value.strip(), image)
                for conversation in conversations:
                    conversation.restart()
                continue
            if not line.strip():
                continue
            responses = []
            for conversation in conversations:
                with status.status(f"asking {printable(conversation.model)}", spinner="line"):
                    responses.append(conversation.ask(replace_surrogates(line.strip()), image))
            _print_answers(console, [conversation.model for conversation in conversations], responses)
        except (UserError, RunError) as error:
            if not interactive:
                raise
            sys.stderr.write(fail_line(error))
        except KeyboardInterrupt:  # the answer is dropped. At the next prompt, Ctrl-C ends the command
            if not interactive:
                raise
            sys.stderr.write("\nstopped\n")


def _follow(command: str, value: str, image: Path | None) -> Path | None:
    """Returns the image after a command.

    Raises:
        UserError: The command is unknown, or the image cannot be opened.
    """
    from vlm_unlearn.generation.conversation import validate_image
    from vlm_unlearn.store import user_path

    match command:
        case "/image":
            return validate_image(user_path(value)) if value else None
        case "/new":
            return image
        case _:
            raise UserError(f"no command {quoted(command)}. {COMMANDS}", code="unknown-command")


def _lines(interactive: bool) -> Iterator[str]:
    """Yields the lines of standard input until its end.

    Raises:
        UserError: A line is too long.
    """
    if sys.stdin is None:  # closed by the caller
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8" if interactive else "utf-8-sig", errors="replace")
    if interactive:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (the arrow keys edit the line and repeat earlier ones)
        while True:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                sys.stdout.write("\n")
                return
            yield line
    number = 0
    while line := sys.stdin.readline(MAX_QUESTION + 1):
        number += 1
        if len(line) > MAX_QUESTION:
            problem = f"the question is longer than {MAX_QUESTION:,} characters. Shorten it."
            raise UserError(problem, code="out-of-range", file="standard input", record=number)
        yield line.rstrip("\r\n")


def _print_answers(console: Console, names: Sequence[str], responses: Sequence[Response]) -> None:
    """Prints the answers: in columns on a terminal that is wide enough, or else one after the other."""
    texts = [_answer_text(response) for response in responses]
    if console.is_terminal and len(names) > 1 and console.width >= len(names) * (MIN_COLUMN + 3):
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAVY, show_lines=False)
        for name in names:
            table.add_column(Text(printable(name)), overflow="fold", ratio=1)
        table.add_row(*map(Text, texts))
        console.print(table)
        return
    for name, text in zip(names, texts, strict=True):
        heading = f"{printable(name)}: " if len(names) > 1 else ""
        console.print(f"{heading}{text}", markup=False, highlight=False, soft_wrap=True)


def _answer_text(response: Response) -> str:
    """Returns an answer without anything that a terminal would act on, or its error."""
    if response.text is None:
        return f"(no answer: {printable(response.error or 'unknown')})"
    lines = response.text.expandtabs(4).splitlines()
    text = "\n".join(printable(line) for line in lines) or "(empty answer)"
    return text + (" … (truncated)" if response.finish_reason == "length" else "")
