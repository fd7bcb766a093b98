"""Help teaches: every command stands in its place on the road, every option is explained, every example can be typed."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from vlm_unlearn.cli import main as cli
from vlm_unlearn.cli.terminal import examples
from vlm_unlearn.config import JudgeConfig, Recipe, Suite

ROOT: Any = typer.main.get_command(cli.app)
KEYS = {key for config in (Recipe, Suite, JudgeConfig) for key in config.model_fields}


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


ALL = dict(commands())


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that a line means, and what it passes; raises as the command would."""
    group, context, path = ROOT, ROOT.make_context("vlm-unlearn", list(words)), []
    while hasattr(group, "commands"):
        rest = [*context._protected_args, *context.args]
        name, group, rest = group.resolve_command(context, rest)
        path.append(name)
        context = group.make_context(name, rest, parent=context)
    return " ".join(path), context.params


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["vlm-unlearn", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize("name", ALL)
def test_every_example_can_be_typed(name: str) -> None:
    found = list(examples(ALL[name].help))
    assert any(example.startswith(f"vlm-unlearn {name}") for example in found)
    for example in found:
        words = shlex.split(example.partition(" > ")[0])
        meant, passed = parse(
            words[words.index("vlm_unlearn.cli.main") + 1 :] if words[0] == "accelerate" else words[1:]
        )
        assert meant in ALL
        for override in passed.get("overrides") or []:
            assert override.partition("=")[0].partition(".")[0] in KEYS, example


def test_an_example_that_cannot_be_typed_is_found() -> None:
    with pytest.raises(typer.TyperException):
        parse(["train", "tiny/npo", "--plann"])


@pytest.mark.parametrize("name", ALL)
def test_every_option_is_explained(name: str) -> None:
    command = ALL[name]
    assert inspect.cleandoc(command.help).split("\n")[0]
    for param in command.params:
        assert param.help, f"{name} {param.name}"
        if param.param_type_name == "option" and param.name == "out":
            assert param.opts == ["--out"]


def test_the_first_page_shows_the_road(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, page, _ = said(capsys, monkeypatch, "--help")
    assert code == 0
    places = [
        page.index(f"\n{heading}")
        for heading in ("Start here:", "1. Prepare", "2. Unlearn", "3. Measure", "4. Compare", "5. Ship")
    ]
    assert places == sorted(places)
    assert all(command.rich_help_panel for command in ROOT.commands.values())
    assert all(f"\n  {name} " in page for name in ROOT.commands)
    for line in ("", "help"):
        assert said(capsys, monkeypatch, line) == (0, page, "")


def test_help_of_a_command_in_both_ways(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, page, _ = said(capsys, monkeypatch, "data import vlguard --help")
    assert said(capsys, monkeypatch, "help data import vlguard")[1] == page
    assert page.startswith("Usage: vlm-unlearn data import vlguard TRAIN.json [OPTIONS]\n")
    example = "vlm-unlearn data import vlguard VLGuard/train.json --images VLGuard/train --harmful-answers harmful.json --out data/vlguard\n"
    assert example in page  # on one line, to be copied


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = said(capsys, monkeypatch, "--version")
    assert (code, out.split()[0]) == (0, "vlm-unlearn")
    assert out.split()[1][0].isdigit()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evalute", 'no command "evalute"; did you mean "evaluate"?'),
        ("audit", 'no command "audit"; did you mean "data audit"?'),
        ("xyzzy", 'no command "xyzzy"; `vlm-unlearn --help` lists them'),
        ("data imprt", 'data: no command "imprt"; did you mean "import"?'),
        ("train tiny/npo --jsn", 'train: no option "--jsn"; did you mean "--json"?'),
        ("train tiny/npo --debug", "it goes before the command: vlm-unlearn --debug"),
        ("train tiny/npo --model=m", "a key of the config has no dashes: model=..."),
        ("evaluate suites/tiny --generation.batch-size 3", "has no dashes: generation.batch_size=..."),
        ("train", "train: missing argument 'RECIPE.yaml'; for example: vlm-unlearn train tiny/npo"),
        ("export runs/npo", "export: missing option '--out'; for example: vlm-unlearn export runs/npo"),
        ("demo --out d --seed one", "demo: invalid value for '--seed'"),
        (
            "data mix a b c d",
            "data mix: got unexpected extra argument(s) (d); `vlm-unlearn data mix --help` tells more",
        ),
        ("export a --out b --precision fp33", "invalid value for '--precision'"),
        ("\x1b[2J", 'no command "\\x1b[2J"'),
    ],
)
def test_wrong_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    code, out, err = said(capsys, monkeypatch, line)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("vlm-unlearn: ")
    assert message in err
