"""Commands load only the modules that they use. Modules are counted, because times depend on the machine.

All light commands run one after the other in one process, and those that need numbers or plots in another. After each,
the modules that are loaded so far are compared with the heavy ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
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
    "optuna",
}
DRAWING = {"matplotlib", "jinja2"}
NUMBERS = {"numpy", "scipy", "pandas"}
HEAVY = MODELS | DRAWING | NUMBERS | {"PIL", "asyncio", "datasketch", "pyarrow"}
# Third-party modules beyond those of typer. The first help loads 8 and all light commands together 226, most of
# them from pydantic, rich and the standard library. numpy alone has 130 more and torch a thousand, so that a heavy
# library that `HEAVY` does not contain is found too.
HELP_CEILING, CEILING = 40, 270
PROGRAM = """
import contextlib, io, json, sys
import typer
typer_modules = set(sys.modules)
from vlm_unlearn.cli.main import main
results = {}
for line in json.loads(sys.argv[1]):
    sys.argv = ["vlm-unlearn", *line]
    code = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    results[" ".join(line)] = [code, sorted(set(sys.modules) - typer_modules), err.getvalue()]
import vlm_unlearn.evaluation.runner
results["import evaluation.runner"] = [0, sorted(set(sys.modules) - typer_modules), ""]
print(json.dumps(results))
"""
HELP = (
    *("", "data", "data audit", "data import files", "train", "benchmark run", "attack search", "compare", "table"),
    *("judge agreement", "evaluate", "report", "recipes", "sweep"),
)
LIGHT = (
    "doctor --json",
    "recipes",
    "judge keyword {folder}/answers.json",
    "benchmark list",
    "data convert {world}/vlguard/train.json {folder}/out.json",
    "score {run}",
    "table {run}",
)
INVALID = ("train tiny/npo trainable.mode=none", "evaluate suites/tiny mode=none --out out")


def loaded_modules(lines: Sequence[Sequence[str]]) -> dict[str, set[str]]:
    """Runs commands in one new process. Returns the modules that are loaded after each, without those of typer."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    expected = {" ".join(line): 2 if " ".join(line) in INVALID else 0 for line in lines}
    assert {line: results[line][0] for line in expected} == expected, {line: results[line][2] for line in expected}
    return {line: set(modules) for line, (_, modules, _) in results.items()}


def third_party(modules: set[str]) -> set[str]:
    return {name for name in modules if name.partition(".")[0] != "vlm_unlearn"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / "base", complies), make_run(folder / "npo", unlearned)]
    for run in runs:
        score_run(run, saved_suite(run), run.name)
    return [str(run) for run in runs]


@pytest.mark.multiprocess
def test_help_invalid_requests_and_light_commands_load_nothing_heavy(
    runs: list[str], world: Path, tmp_path: Path
) -> None:
    (tmp_path / "answers.json").write_text('{"a": "I cannot help with that.", "b": "First take the red one."}')
    light = [line.format(folder=tmp_path, world=world, run=runs[0]).split() for line in LIGHT]
    helps = [[*command.split(), "--help"] for command in HELP]
    loaded = loaded_modules([*helps, *(line.split() for line in INVALID), *light])
    assert not loaded["--help"] & (HEAVY | {"pydantic", "yaml", "rich", "importlib.metadata"})
    assert len(third_party(loaded["--help"])) < HELP_CEILING
    heavy = {line: sorted(modules & HEAVY) for line, modules in loaded.items() if line != "import evaluation.runner"}
    assert not any(heavy.values()), heavy
    assert len(third_party(loaded[" ".join(light[-1])])) < CEILING
    assert "torch" not in loaded["import evaluation.runner"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_compare_loads_only_numbers_and_report_loads_no_models(runs: list[str], tmp_path: Path) -> None:
    compare, report = ["compare", *runs], ["report", *runs, "--out", str(tmp_path / "report")]
    loaded = loaded_modules([compare, report])
    assert not loaded[" ".join(compare)] & (HEAVY - NUMBERS)
    assert "numpy" in loaded[" ".join(compare)]
    assert not loaded[" ".join(report)] & MODELS
    assert loaded[" ".join(report)] >= DRAWING
