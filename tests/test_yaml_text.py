"""YAML and JSON that stand for far more than their text, or take forever to read, are errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.config import Recipe, load
from vlm_unlearn.judging.rubric import load_rubric
from vlm_unlearn.store import read_json

LEVELS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
MERGES = "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30))
HOSTILE = {
    "aliases": f"a0: &a0 [x, x]\n{LEVELS}\nmethod: npo\n",
    "merge keys": f"a0: &a0 {{x: 1}}\n{MERGES}\nmethod: npo\n",
    "contains itself": "method: &a [*a]\n",
    "long": "model: " + "x" * (2 << 20) + "\n",
    "nested": "model: " + "[" * 50_000 + "]" * 50_000 + "\n",
    "many values": "model: [" + "1," * 200_000 + "]\n",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_gigantic_yaml_is_an_error(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(HOSTILE[name])
    with raises_code("invalid-yaml", file=file):
        load(Recipe, file)
    if name in ("aliases", "merge keys", "contains itself"):
        rubric = tmp_path / "rubric.txt"
        rubric.write_text(f"---\n{HOSTILE[name]}---\n{{answer}}\n")
        with raises_code("invalid-yaml", file=rubric):
            load_rubric(str(rubric))


@pytest.mark.timeout(60)
def test_endless_file_is_an_error() -> None:
    with raises_code("invalid-yaml"):
        load(Recipe, Path("/dev/zero"))


def test_aliases_are_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: m\ndata: d\noutput: o\nmethod: npo\n"
        "trainable: {mode: lora, lora: {target_modules: &names [q_proj, v_proj]}, parameter_patterns: *names}\n"
    )
    assert load(Recipe, file).trainable.parameter_patterns == ["q_proj", "v_proj"]


@pytest.mark.timeout(60)
def test_duplicate_among_many_keys_is_found_quickly(tmp_path: Path) -> None:
    keys = [f"key{number}" for number in range(300_000)]
    file = tmp_path / "values.json"
    file.write_text("{" + ", ".join(f"{json.dumps(key)}: 1" for key in [*keys, keys[-1]]) + "}")
    with raises_code("duplicate-key", file=file):
        read_json(file)
