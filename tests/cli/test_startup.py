"""A command loads what it uses: modules are counted, since a clock says more of the machine than of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finished_runs import complies, make_run, unlearned
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.scoring import score_run

MODELS = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "openai",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
}
DRAWING = {"plotly", "matplotlib", "jinja2"}
NUMBERS = {"numpy", "scipy", "pandas"}
HEAVY = MODELS | DRAWING | NUMBERS | {"PIL", "asyncio", "datasketch", "pyarrow"}
# Modules of others beyond what typer itself loads. The help loads 8 and other light commands up to 200, most of them pydantic's, rich's and
# the standard library's; numpy alone is 130 more, torch a thousand. So a heavy library that `HEAVY` doesn't name is seen too.
HELP_CEILING, CEILING = 40, 270
PROGRAM = """
import json, sys
import typer
before = set(sys.modules)
from vlm_unlearn.cli.main import main
try:
    main()
finally:
    sys.stderr.write("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded_by(arguments: list[str], code: int = 0) -> set[str]:
    """The modules that a command loads beyond typer's own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def others(loaded: set[str]) -> set[str]:
    return {name for name in loaded if name.partition(".")[0] != "vlm_unlearn"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    made = [make_run(folder / "base", complies), make_run(folder / "npo", unlearned)]
    for run in made:
        score_run(run, saved_suite(run), run.name)
    return [str(run) for run in made]


def test_help_is_typer_and_our_own_commands() -> None:
    loaded = loaded_by(["--help"])
    assert not loaded & (HEAVY | {"pydantic", "yaml", "rich", "importlib.metadata"})
    assert len(others(loaded)) < HELP_CEILING


@pytest.mark.parametrize(
    "line",
    [
        "train --help",
        "doctor --json",
        "recipes",
        "judge keyword {folder}/answers.json",
        "benchmark list",
        "data convert {world}/vlguard/train.json {folder}/out.json",
        "score {run}",
        "table {run}",
    ],
)
def test_light_commands_stay_light(line: str, runs: list[str], world: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text('{"a": "I cannot help with that.", "b": "First take the red one."}')
    loaded = loaded_by(line.format(folder=tmp_path, world=world, run=runs[0]).split())
    assert not loaded & HEAVY
    assert len(others(loaded)) < CEILING


@pytest.mark.parametrize("line", ["train tiny/npo trainable.mode=none", "evaluate suites/tiny mode=none --out out"])
def test_a_wrong_request_is_refused_before_anything_is_loaded(line: str) -> None:
    assert not loaded_by(line.split(), code=2) & HEAVY


def test_comparing_needs_numbers_alone(runs: list[str]) -> None:
    loaded = loaded_by(["compare", *runs])
    assert not loaded & (HEAVY - NUMBERS)
    assert "numpy" in loaded


def test_a_report_needs_no_model(runs: list[str], tmp_path: Path) -> None:
    loaded = loaded_by(["report", *runs, "--out", str(tmp_path / "report")])
    assert not loaded & MODELS
    assert loaded >= {"plotly", "matplotlib"}
