"""Each package imports only from the packages before it in the list."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "vlm_unlearn"
ORDER = [
    *(
        "errors",
        "losses",
        "records",
        "store",
        "plugins",
        "distributed",
        "worker_pool",
        "config",
        "metrics",
        "data",
        "data_tools",
    ),
    *("methods", "modeling", "attacks", "training", "generation", "judging", "benchmarks"),
    *("evaluation", "robustness", "sweeps", "reporting", "worlds", "cli"),
]


def layer_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_module_is_in_a_layer() -> None:
    assert {layer_of(path) for path in SOURCE.rglob("*.py")} - {"__init__"} == set(ORDER)


def test_packages_import_only_from_earlier_layers() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        layer = layer_of(path)
        if layer == "__init__":  # offers the public names of all packages, lazily
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vlm_unlearn."):
                imported = node.module.split(".")[1]
                if ORDER.index(imported) > ORDER.index(layer):
                    wrong.append(f"{path.relative_to(SOURCE)} imports {node.module}")
    assert not wrong
