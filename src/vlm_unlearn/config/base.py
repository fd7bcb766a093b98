"""The base class of all configs, and the deprecated names of their keys and values."""

from __future__ import annotations

import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from vlm_unlearn.errors import DeprecatedNameWarning, UserError
from vlm_unlearn.plugins import Registry, absolute_name, is_file_name

Positive = Annotated[int, Field(gt=0, lt=2**31)]


class DeprecatedNames(BaseModel):
    """Base of configs that also read the keys and values of the previous version, with a `FutureWarning`.

    The next version removes the old names. A choice such as ``off``, which YAML reads as a boolean, is read as text.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {}  # old key -> new key
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}  # new key -> old value -> new value

    @model_validator(mode="before")
    @classmethod
    def _read_plain_values(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        renamed = rename_deprecated(cls, value)
        annotations = {name: field.annotation for name, field in cls.model_fields.items()}
        return {key: choice_of_boolean(annotations.get(key), item) for key, item in renamed.items()}


@dataclass(frozen=True)
class PluginName:
    """Marks a text field that contains the name of a plug-in, or ``FILE.py:OBJECT``, whose path becomes absolute.

    Validation imports no plug-in. An unknown name is an error where the plug-in is used, so that the files of a run can
    be read without its plug-ins.
    """

    registry: Registry[Any]
    files: bool = True  # whether the name may be FILE.py:OBJECT

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, name: str) -> str:
        if not self.files and is_file_name(name):
            raise UserError(
                f"a {self.registry.kind} cannot be in a file. Install it as a package with an entry point "
                f"in the group {self.registry.group}.",
                code="unsupported-setting",
            )
        return absolute_name(name)


class Strict(DeprecatedNames):
    """Base of every config: unknown keys are errors, and values cannot change after validation.

    The docstring below a field documents it in the code, in `model_fields` and in the reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def rename_deprecated(config: type[BaseModel], value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the mapping with the current names of its keys and values, those of nested configs included.

    Warns:
        DeprecatedNameWarning: For each deprecated name.

    Raises:
        ValueError: A key occurs under both its old and its new name.
    """
    keys = getattr(config, "renamed_keys", {})
    values = getattr(config, "renamed_values", {})
    renamed: dict[str, Any] = {}
    for old, item in value.items():
        key = keys.get(old, old)
        if key != old:
            _warn(f'the key "{prefix}{old}" is deprecated; use "{prefix}{key}"')
        if key in renamed or (key != old and key in value):
            raise ValueError(f'"{old}" is the old name of "{key}"; remove "{old}"')
        if isinstance(item, str) and item in values.get(key, {}):
            new_item = values[key][item]
            _warn(f'"{prefix}{key}: {item}" is deprecated; use "{new_item}"')
            item = new_item
        field = config.model_fields.get(key)
        annotation = None if field is None else field.annotation
        nested = next(nested_configs(annotation), None)
        renamed[key] = item if nested is None else _rename_nested(nested, annotation, item, f"{prefix}{key}.")
    return renamed


def _rename_nested(config: type[BaseModel], annotation: object, item: Any, prefix: str) -> Any:
    """Renames the keys of a config, of a list of configs, or of a mapping from names to configs."""
    container = typing.get_origin(annotation)
    if container is list and isinstance(item, list):
        return [_rename_nested(config, config, entry, prefix) for entry in item]
    if container is dict and isinstance(item, Mapping):
        return {name: _rename_nested(config, config, entry, f"{prefix}{name}.") for name, entry in item.items()}
    return rename_deprecated(config, item, prefix) if isinstance(item, Mapping) else item


def nested_configs(annotation: object) -> Iterator[type[BaseModel]]:
    """Yields the config classes in the type of a field, such as `SplitConfig` in ``list[SplitConfig]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from nested_configs(argument)


# The words that YAML 1.1 reads as booleans, in lower case.
YAML_WORDS = {True: ("on", "yes", "true"), False: ("off", "no", "false")}


def choice_of_boolean(annotation: object, value: Any) -> Any:
    """Returns the choice of a field that YAML has read as a boolean, such as ``off``, or else the value.

    Args:
        annotation: The type of the field. Only its string choices count, and none do if it also accepts a boolean.
        value: The value from a YAML file or an override, or a list of such values.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return choice_of_boolean(arguments[0], value)
    if origin is list and isinstance(value, list):
        return [choice_of_boolean(arguments[0], item) for item in value]
    if not isinstance(value, bool):
        return value
    members = arguments if origin in (typing.Union, types.UnionType) else (annotation,)
    if bool in members:
        return value
    literals = [member for member in members if typing.get_origin(member) is Literal]
    choices = [choice for literal in literals for choice in typing.get_args(literal)]
    words = [choice for choice in choices if isinstance(choice, str) and choice.lower() in YAML_WORDS[value]]
    return words[0] if len(words) == 1 else value


def _warn(message: str) -> None:
    warnings.warn(message, DeprecatedNameWarning, stacklevel=3)
