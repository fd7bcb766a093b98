"""The help: every command has its section, every option an explanation, and every example can be run."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from helpers import error_code, run_in_process
from vlm_unlearn.cli import main as cli
from vlm_unlearn.cli.terminal import examples
from vlm_unlearn.config import JudgeConfig, Recipe, Suite, Sweep

ROOT: Any = typer.main.get_command(cli.app)
KEYS = {key for config in (Recipe, Suite, Sweep, JudgeConfig) for key in config.model_fields}


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


ALL = dict(commands())


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Returns the command of a line and its parameters, or raises as the command would."""
    group, context, path = ROOT, ROOT.make_context("vlm-unlearn", list(words)), []
    while hasattr(group, "commands"):
        rest = [*context._protected_args, *context.args]
        name, group, rest = group.resolve_command(context, rest)
        path.append(name)
        context = group.make_context(name, rest, parent=context)
    return " ".join(path), context.params


def run_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["vlm-unlearn", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize("name", ALL)
def test_every_example_parses(name: str) -> None:
    commands = list(examples(ALL[name].help))
    assert any(example.startswith(f"vlm-unlearn {name}") for example in commands)
    for example in commands:
        words = shlex.split(example.partition(" > ")[0])
        command, parameters = parse(
            words[words.index("vlm_unlearn.cli.main") + 1 :] if words[0] == "accelerate" else words[1:]
        )
        assert command in ALL
        for override in parameters.get("overrides") or []:
            assert override.partition("=")[0].partition(".")[0] in KEYS, example


def test_an_invalid_example_is_detected() -> None:
    with pytest.raises(typer.TyperException):
        parse(["train", "tiny/npo", "--plann"])


@pytest.mark.parametrize("name", ALL)
def test_every_option_has_a_help_text(name: str) -> None:
    command = ALL[name]
    assert inspect.cleandoc(command.help).split("\n")[0]
    for param in command.params:
        assert param.help, f"{name} {param.name}"
        if param.param_type_name == "option" and param.name == "out":
            assert param.opts == ["--out"]


def test_main_help_lists_all_commands_by_section(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, page, _ = run_line(capsys, monkeypatch, "--help")
    assert code == 0
    positions = [
        page.index(f"\n{heading}")
        for heading in ("Start here:", "1. Prepare", "2. Unlearn", "3. Measure", "4. Compare", "5. Ship")
    ]
    assert positions == sorted(positions)
    assert all(command.rich_help_panel for command in ROOT.commands.values())
    assert all(f"\n  {name} " in page for name in ROOT.commands)
    for line in ("", "help"):
        assert run_line(capsys, monkeypatch, line) == (0, page, "")


def test_help_command_equals_help_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, page, _ = run_line(capsys, monkeypatch, "data import vlguard --help")
    assert run_line(capsys, monkeypatch, "help data import vlguard")[1] == page
    assert page.startswith("Usage: vlm-unlearn data import vlguard TRAIN.json [OPTIONS]\n")
    (example,) = [line for line in page.splitlines() if line.strip().startswith("vlm-unlearn data import vlguard VL")]
    assert example.endswith(" --harmful-answers harmful.json --out data/vlguard")  # on one line, to be copied


def test_version_option_prints_the_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run_line(capsys, monkeypatch, "--version")
    assert (code, out.split()[0]) == (0, "vlm-unlearn")
    assert out.split()[1][0].isdigit()


@pytest.mark.parametrize(
    ("line", "code", "tokens"),
    [
        ("evalute", "unknown-command", ['"evalute"', 'did you mean "evaluate"?']),
        ("audit", "unknown-command", ['did you mean "data audit"?']),
        ("xyzzy", "unknown-command", ['"xyzzy"', "`vlm-unlearn --help`"]),
        ("data imprt", "unknown-command", ["data: ", 'did you mean "import"?']),
        ("train tiny/npo --jsn", "unknown-option", ["train: ", '"--jsn"; did you mean "--json"?']),
        ("train tiny/npo --debug", "unknown-option", ["vlm-unlearn --debug"]),
        ("train tiny/npo --model=m", "unknown-option", [" model=..."]),
        ("evaluate suites/tiny --generation.batch-size 3", "unknown-option", [" generation.batch_size=..."]),
        ("train", "invalid-usage", ["train: ", "'RECIPE.yaml'", "vlm-unlearn train tiny/npo"]),
        ("export runs/npo", "invalid-usage", ["export: ", "'--out'", "vlm-unlearn export runs/npo"]),
        ("demo --out d --seed one", "invalid-usage", ["demo: ", "'--seed'"]),
        ("data mix a b c d", "invalid-usage", ["data mix: ", "(d)", "`vlm-unlearn data mix --help`"]),
        ("export a --out b --precision fp33", "invalid-usage", ["'--precision'"]),
        ("\x1b[2J", "unknown-command", ['"\\x1b[2J"']),
    ],
)
def test_invalid_usage_is_one_line_with_a_fix(line: str, code: str, tokens: list[str]) -> None:
    done = run_in_process(*line.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n"), error_code(done)) == (2, "", 1, code)
    assert done.stderr.startswith("vlm-unlearn: ")
    assert not [token for token in tokens if token not in done.stderr], done.stderr
