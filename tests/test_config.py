"""Recipes and suites: unknown keys are refused with the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_unlearn.config import Recipe, Suite, load, shipped
from vlm_unlearn.errors import RequestError

MINIMAL = "model: m\ndata: d\noutput: o\nmethod: npo\n"
RECIPES = Path(__file__).parents[1] / "recipes"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_overrides_reach_nested_keys_and_read_exponents(tmp_path: Path) -> None:
    recipe = load(Recipe, write(tmp_path, MINIMAL), ["training.learning_rate=1e-4", "method.beta=0.5", "trainable.mode=lora"])
    assert recipe.training.learning_rate == 1e-4
    assert (recipe.method.name, recipe.method.model_extra) == ("npo", {"beta": 0.5})
    assert recipe.trainable.mode == "lora"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL + "trainning: {}\n", [], r'unknown key "trainning"; did you mean "training"\?'),
        (MINIMAL, ["training.learning_rat=1"], r'unknown key "training\.learning_rat"; did you mean "learning_rate"\?'),
        (MINIMAL, ["trainable.lora.rr=4"], r'unknown key "trainable\.lora\.rr"'),
        (MINIMAL, ["training.learning_rate=-1"], r"training\.learning_rate: Input should be greater than 0"),
        ("method: npo\ndata: d\noutput: o\n", [], r'key "model" is missing'),
        (MINIMAL, ["beta"], r"write key=value"),
        ("model: [", [], r"line 1: not valid YAML"),
        ("just text", [], r"expected keys and values"),
    ],
)
def test_wrong_recipes_get_one_clear_line(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load(Recipe, write(tmp_path, text), overrides)


def test_a_metric_must_name_a_case() -> None:
    with pytest.raises(RequestError, match=r'names the case "unsaf", which is not there; did you mean "unsafe"'):
        load(Suite, Path("suites/tiny"), ["model=m", "metrics.asr.cases=[unsaf]"])


def test_shipped_recipes_and_suites_parse() -> None:
    from vlm_unlearn.methods import build_method

    files = sorted(RECIPES.rglob("*.yaml"))
    assert len(files) >= 8
    for file in files:
        name = file.relative_to(RECIPES).with_suffix("")
        assert shipped(name) == file
        if name.parts[0] == "suites":
            load(Suite, name, ["model=m", "root=/data"])
        else:
            recipe = load(Recipe, name, ["model=m", "data=d", "output=o"])
            build_method(recipe.method, recipe.prompt_decouple_weight)


def test_a_suites_paths_are_below_its_root() -> None:
    suite = load(Suite, Path("suites/tiny"), ["model=m", "root=/world"])
    assert suite.cases[0].file == Path("/world/vlguard/test.json")
    assert suite.judge.world == Path("/world/world.json")
    assert Suite.model_validate(suite.model_dump()) == suite
