"""Words that YAML 1.1 reads as booleans, such as off, are read as the choices that they are."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel

import vlm_unlearn.judging.rubric
import vlm_unlearn.methods
import vlm_unlearn.worlds.tiny.judge  # noqa: F401  (with the modules above: defines all configs)
from helpers import raises_code
from vlm_unlearn.config import Recipe, Strict, load, validate
from vlm_unlearn.config.base import YAML_WORDS, DeprecatedNames
from vlm_unlearn.training.arguments import UnlearningConfig

MINIMAL = "model: m\ndata: d\noutput: o\nmethod: npo\n"


class Switches(Strict):
    """Every form that a field with such choices can have."""

    plain: Literal["on", "off", "auto"] = "auto"
    optional: Literal["yes", "no"] | None = None
    several: list[Literal["no", "some"]] = []  # noqa: RUF012
    annotated: Annotated[Literal["OFF", "ON"], "a comment"] = "ON"
    boolean: bool | Literal["sine"] = True
    words: Literal["off", "false", "on"] = "on"  # false could be both


def configs(base: type[BaseModel] = DeprecatedNames) -> Iterator[type[BaseModel]]:
    for config in base.__subclasses__():
        yield config
        yield from configs(config)


def choices(annotation: object) -> Iterator[str]:
    if typing.get_origin(annotation) is Literal:
        yield from (choice for choice in typing.get_args(annotation) if isinstance(choice, str))
    else:
        for argument in typing.get_args(annotation):
            yield from choices(argument)


FIELDS = [
    (config, name, choice)
    for config in configs()
    for name, field in config.model_fields.items()
    for choice in dict.fromkeys(choices(field.annotation))
    if config is not Switches
]


def read(config: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """The values as the config reads them before it validates them."""
    return dict(config._read_plain_values(values))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("config", "name", "choice"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_each_choice_of_each_field_can_be_written_without_quotes(
    config: type[BaseModel], name: str, choice: str
) -> None:
    for text in (choice, choice.upper() if choice in sum(YAML_WORDS.values(), ()) else choice):
        assert read(config, yaml.safe_load(f"{name}: {text}")) == {name: choice}
        assert read(config, yaml.safe_load(f"{name}: [{text}]")) in ({name: [choice]}, {name: [yaml.safe_load(text)]})


def test_the_fields_contain_one_with_such_a_word() -> None:
    words = sum(YAML_WORDS.values(), ())
    assert ("TrainingConfig", "feature_cache", "off") in {
        (config.__name__, name, choice) for config, name, choice in FIELDS if choice in words
    }


@pytest.mark.parametrize("word", ["off", "Off", "OFF", "no", "false", '"off"'])
def test_feature_cache_off_in_a_file_an_extending_file_and_an_override(word: str, tmp_path: Path) -> None:
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text(f"{MINIMAL}training: {{feature_cache: {word}}}\n")
    top.write_text("extends: base\ntraining: {seed: 1}\n")
    plain = tmp_path / "plain.yaml"
    plain.write_text(MINIMAL)
    for recipe in (load(Recipe, base), load(Recipe, top), load(Recipe, plain, [f"training.feature_cache={word}"])):
        assert recipe.training.feature_cache == "off"
    arguments = UnlearningConfig(output_dir=str(tmp_path), feature_cache=yaml.safe_load(word), use_cpu=True)
    assert arguments.feature_cache == "off"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain: on", "on"),
        ("plain: off", "off"),
        ("plain: yes", "on"),
        ("optional: no", "no"),
        ("optional: null", None),
        ("several: [no, some, off]", ["no", "some", "no"]),
        ("annotated: off", "OFF"),
        ("boolean: off", False),
        ("boolean: sine", "sine"),
    ],
)
def test_forms_of_fields(text: str, expected: object) -> None:
    values = yaml.safe_load(text)
    (name,) = values
    assert getattr(validate(Switches, values, "file"), name) == expected


@pytest.mark.parametrize("text", ["words: off", "several: [yes]", "optional: 1"])
def test_other_booleans_stay_errors(text: str) -> None:
    with raises_code("invalid-field"):
        validate(Switches, yaml.safe_load(text), "file")


@pytest.mark.parametrize("override", ["name=on", "name=No", "data=off", "model=yes"])
def test_a_word_as_free_text_is_an_error_that_names_the_quotes(override: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    key = override.partition("=")[0]
    with raises_code("invalid-field", field=key) as caught:
        load(Recipe, file, [override])
    assert "quotes" in str(caught.value)
