"""Imports go one way: each folder imports only from those above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "vlm_unlearn"
ORDER = [
    *(
        "errors",
        "losses",
        "records",
        "store",
        "distributed",
        "config",
        "data",
        "models",
        "methods",
        "training",
        "generation",
        "attacks",
    ),
    *("judging", "benchmarks", "metrics", "evaluation", "reporting", "tiny_world", "cli"),
]


def layer_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_module_is_in_a_layer() -> None:
    assert {layer_of(path) for path in SOURCE.rglob("*.py")} - {"__init__"} == set(ORDER)


def test_imports_go_up_only() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        layer = layer_of(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vlm_unlearn."):
                imported = node.module.split(".")[1]
                if ORDER.index(imported) > ORDER.index(layer):
                    wrong.append(f"{path.relative_to(SOURCE)} imports {node.module}")
    assert not wrong


COMMANDS = (
    "",
    "data",
    "data audit",
    "data import files",
    "train",
    "benchmark run",
    "attack search",
    "compare",
    "table",
    "judge agreement",
    "evaluate",
    "report",
    "recipes",
)


@pytest.mark.parametrize("command", [line.split() for line in COMMANDS])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['vlm-unlearn', *sys.argv[1:], '--help']\n"
        "from vlm_unlearn.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'plotly', 'jinja2', 'datasets', 'openai', 'numpy', 'scipy', 'datasketch', 'PIL'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_judging_needs_no_torch() -> None:
    code = "import sys, vlm_unlearn.evaluation.runner\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
