"""A value of ten thousand characters does not fill the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import error_code, run_in_process
from vlm_unlearn.config import Recipe, Suite, load
from vlm_unlearn.config.loader import _paths
from vlm_unlearn.errors import UserError

LONG = "x" * 10_000
MAX_CHARACTERS = 1200  # of standard error: about a quarter of a terminal's screen
RECIPE = ("train", "tiny/npo", "model=m", "data=d", "output=o")
SUITE = ("evaluate", "suites/own_data", "model=m", "root=.", "--out", "o")
VALUES = [LONG, f"[{LONG}]", f"{{{LONG}: 1}}", f"[{','.join(['word'] * 3000)}]", f"[{LONG}", f"{{name: {LONG}}}"]


@pytest.mark.parametrize("value", VALUES, ids=["text", "list", "mapping", "many", "not YAML", "name"])
@pytest.mark.parametrize(
    ("config", "name"), [(Recipe, "tiny/npo"), (Suite, "suites/own_data")], ids=["recipe", "suite"]
)
def test_no_key_prints_a_long_value(config: Any, name: str, value: str) -> None:
    required = ["model=m", "data=d", "output=o"] if config is Recipe else ["model=m"]
    messages = {}
    for key in (*_paths(config), "splits.unsafe.kind", "judges.mine.name", LONG, f"training.{LONG}"):
        try:
            load(config, Path(name), [*required, f"{key}={value}"])
        except UserError as error:
            messages[key] = str(error)
    assert len(messages) > 10
    assert {key: message[:200] for key, message in messages.items() if len(message) >= MAX_CHARACTERS} == {}


@pytest.mark.parametrize(
    "arguments",
    [
        (*RECIPE, LONG),
        (*RECIPE, f"model={LONG}"),
        (*RECIPE, f"data={LONG}"),
        (*RECIPE, f"output={LONG}"),
        (*RECIPE, f"method={LONG}"),
        (*RECIPE, f"--{LONG}"),
        ("train", LONG),
        (*SUITE, f"model={LONG}"),
        (*SUITE, f"root={LONG}"),
        (*SUITE, f"splits.{LONG}.kind=unsafe"),
        (*SUITE, f"judge.rubric={LONG}"),
        ("data", "check", LONG),
        ("data", "import", "files", LONG, "--images", LONG, "--out", LONG),
        ("judge", "run", LONG, f"name={LONG}"),
        ("score", LONG, f"{LONG}={LONG}"),
        ("compare", LONG, LONG),
        ("export", LONG, "--out", LONG),
        ("benchmark", "score", LONG, "--predictions", LONG, "--annotations", LONG),
        (LONG,),
    ],
    ids=lambda arguments: " ".join(argument.replace(LONG, "LONG") for argument in arguments),
)
def test_commands_print_few_lines(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_in_process(*arguments)
    assert done.returncode == 2
    assert error_code(done)
    assert len(done.stdout + done.stderr) < MAX_CHARACTERS
