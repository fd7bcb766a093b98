"""Reads configs: YAML files that can extend each other, with dotted overrides."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vlm_unlearn.config.base import nested_configs, rename_deprecated
from vlm_unlearn.config.yaml_text import parse_yaml, read_bounded
from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.plugins import METHODS
from vlm_unlearn.store import describe_path

Config = TypeVar("Config", bound=BaseModel)

_SHIPPED = (
    Path(__file__).parents[1] / "recipes",
    Path(__file__).parents[3] / "recipes",
)  # of an installed package, and of a source checkout


def shipped_path(name: str | Path) -> Path:
    """Returns the file of a recipe or suite, given as a path or as a shipped name such as ``tiny/npo``."""
    path = Path(name)
    if path.is_file() or not path.name:
        return path
    files = (folder / _with_yaml_suffix(path) for folder in _SHIPPED)
    return next((file for file in files if file.is_file()), path)


def load(
    config: type[Config], path: Path, overrides: Sequence[str] = (), values: Mapping[str, object] | None = None
) -> Config:
    """Reads a YAML file into a config, and applies ``key.sub=value`` overrides, whose values are YAML too.

    The top-level key ``extends: NAME`` reads another file first. NAME is a shipped name, or a file next to this one, in
    which case ``.yaml`` is optional. Mappings are merged, and other values replace those of the extended file. A
    mapping with a different ``name``, such as another method, is replaced too.

    Args:
        config: The config class, such as `Recipe` or `Suite`.
        path: The YAML file, or a shipped name.
        overrides: Dotted overrides, such as ``training.seed=1``.
        values: Values of top-level keys that are not parsed, such as paths.

    Returns:
        The validated config.

    Raises:
        UserError: The file is missing or not valid YAML, a key is unknown, or a value is invalid. The message suggests
            the nearest known key.
    """
    path = shipped_path(path)
    value, bases = _read(path, (), config)
    for key, kind in _KEYS_OF_OTHER_CONFIG.items():
        if key in value and key not in config.model_fields:
            raise UserError(f"is {kind}", code="wrong-config", file=path)
    source = f"{path} (extends {', '.join(bases)})" if bases else str(path)
    return validate(config, {**apply_overrides(value, overrides, config), **(values or {})}, source)


_KEYS_OF_OTHER_CONFIG = {
    "objectives": "a sweep, for `vlm-unlearn sweep`",
    "method": "a recipe, for `vlm-unlearn train`",
    "metrics": "a suite, for `vlm-unlearn evaluate`",
    "questions": "a robustness suite, for `vlm-unlearn robustness`",
}


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys. The standard one silently drops the first value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key = key_node.value
                if key in keys:
                    raise yaml.constructor.ConstructorError(None, None, f'duplicate key "{key}"', key_node.start_mark)
                keys.add(key)
        return super().construct_mapping(node, deep)


def shipped_names() -> list[str]:
    """Returns the names of the shipped recipes and suites."""
    return [
        str(file.relative_to(folder))[: -len(".yaml")]
        for folder in _SHIPPED
        for file in sorted(folder.rglob("*.yaml"))
        if not file.stem.startswith("_") and file.parent.name != "engines"
    ]


def read_resolved(name: str | Path) -> dict[str, Any]:
    """Returns the keys of a YAML file, merged with those of the files that it extends.

    Raises:
        UserError: As `load`.
    """
    return _read(shipped_path(name), ())[0]


def starter_text(name: str) -> str:
    """Returns the text of a shipped file, as the start of a file in another folder.

    The name after ``extends`` is completed so that it is valid in any folder.

    Raises:
        UserError: There is no shipped file of that name. The message suggests the nearest one.
    """
    name = name.removesuffix(".yaml")
    if name not in shipped_names():
        raise UserError(
            f"no shipped recipe or suite {quoted(name)}{nearest(name, shipped_names())}; "
            "`vlm-unlearn recipes` lists them",
            code="unknown-name",
        )
    text = shipped_path(name).read_text(encoding="utf-8")
    return re.sub(r"^extends: *(?=[\w.-]+ *$)", f"extends: {Path(name).parent}/", text, flags=re.MULTILINE)


def _read(
    path: Path, readers: tuple[Path, ...], config: type[BaseModel] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Returns the keys of a file merged with those of the file it extends, and the names of the extended files.

    Args:
        readers: The files that led to this one by ``extends``, to detect a circle.
        config: Renames the deprecated keys of each file to those of this config, so that old and new names merge.
    """
    if path.resolve() in (reader.resolve() for reader in readers):
        circle = " -> ".join(map(str, (*readers, path)))
        raise UserError(f"circular reference: {circle}", code="invalid-field", file=readers[-1], field="extends")
    value = read_yaml(path, readers)
    name = value.pop("extends", None)
    if config is not None:
        value = _renamed(config, value, path)
    if name is None:
        return value, []
    if not isinstance(name, str) or not Path(name).name or not name.isprintable():
        raise UserError(
            "expected one name, such as `extends: npo_7b`", code="invalid-field", file=path, field="extends"
        )
    sibling = path.parent / name
    base = next((file for file in (sibling, _with_yaml_suffix(sibling)) if file.is_file()), shipped_path(name))
    base_value, bases = _read(base, (*readers, path), config)
    return merge_keys(base_value, value), [name, *bases]


def read_yaml(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns the keys of a single file. A method that is given by its name alone is expanded.

    Raises:
        UserError: The file is missing or not valid YAML, or is not a mapping.
    """
    try:
        value = parse_yaml(read_bounded(path), _UniqueKeyLoader)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        suggestion = _nearest_shipped(path) if missing else describe_path(path)
        reader = f" ({readers[-1]} extends it)" if readers else ""
        code = "file-not-found" if missing else "file-unreadable"
        raise UserError(f"{error.strerror}{suggestion}{reader}", code=code, file=path) from None
    except Exception as error:  # PyYAML raises arbitrary errors for invalid dates and numbers, and for deep nesting
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{line}not valid YAML: {problem}", code="invalid-yaml", file=path) from None
    if not isinstance(value, dict):
        raise UserError("expected keys and values, such as `method: npo`", code="invalid-yaml", file=path)
    if isinstance(value.get("method"), str):
        value["method"] = {"name": value["method"]}
    return value


def _nearest_shipped(path: Path) -> str:
    """Returns a suggestion for a missing file: the shipped name with the same last component, or the nearest one."""
    names = shipped_names()
    same = [name for name in names if Path(name).name == path.name.removesuffix(".yaml")]
    return nearest(same[0] if same else str(path), names)


def _with_yaml_suffix(path: Path) -> Path:
    # Path.with_suffix would truncate llama_3.2 at its dot.
    return path if path.suffix == ".yaml" else path.with_name(path.name + ".yaml")


def merge_keys(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merges two mappings. Values of `top` win, and mappings of the same ``name`` are merged."""
    merged = {**base, **top}
    for key in base.keys() & top.keys():
        old, new = base[key], top[key]
        if isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) == old.get("name"):
            merged[key] = merge_keys(old, new)
    return merged


def _renamed(config: type[BaseModel], value: Mapping[str, Any], file: Path | None = None) -> dict[str, Any]:
    """Returns the mapping with the current names of deprecated keys."""
    try:
        return rename_deprecated(config, value)
    except ValueError as error:
        raise UserError(str(error), code="duplicate-key", file=file) from None


def apply_overrides(
    value: dict[str, Any], overrides: Sequence[str], config: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Applies ``key.sub=value`` overrides to a nested mapping and returns the mapping.

    A key of the path that is missing is added. An item of a list is named by its ``name`` or by its index.

    Args:
        value: The nested mapping, which is changed.
        overrides: The overrides. Their values are YAML.
        config: Renames the deprecated keys of the mapping and of the overrides to those of this config.

    Raises:
        UserError: An override is not ``key=value``, its value is not YAML, or a list has no such item.
    """
    if config is not None:
        value = _renamed(config, value)
    for text in overrides:
        dotted, equals, raw = text.partition("=")
        if not equals or not dotted.strip():
            raise UserError(
                f"the override {quoted(text)} is not key=value, for example training.learning_rate=1e-5",
                code="invalid-override",
            )
        try:
            parsed = parse_exponent(parse_yaml(raw))
        except Exception:  # PyYAML raises arbitrary errors
            raise UserError(
                f"the value of the override {quoted(text)} is not valid YAML", code="invalid-override"
            ) from None
        keys = dotted.strip().split(".")
        if config is not None:
            keys, parsed = _current_names(config, keys, parsed)
        *parents, last = keys
        target: Any = value
        for parent in parents:
            target = _child(target, parent, text)
        if isinstance(target, list):
            target[_index(target, last, text)] = parsed
            continue
        if last in _NAME_KEYS and not parents and isinstance(parsed, str):
            parsed = {"name": parsed}
        target[last] = parsed
    return value


def _current_names(config: type[BaseModel], keys: Sequence[str], value: Any) -> tuple[list[str], Any]:
    """Renames the deprecated keys in the path of an override, and its value if that is deprecated."""
    current: type[BaseModel] | None = config
    renamed: list[str] = []
    is_item = False  # whether the next key names an item of a list or mapping of configs
    for number, key in enumerate(keys):
        if current is None or is_item:
            renamed.append(key)
            is_item = False
            continue
        is_last = number == len(keys) - 1
        (new_key, new_value), *_ = rename_deprecated(current, {key: value if is_last else None}).items()
        renamed.append(new_key)
        value = new_value if is_last else value
        field = current.model_fields.get(new_key)
        current = next(nested_configs(field.annotation), None) if field is not None else None
        is_item = field is not None and typing.get_origin(field.annotation) in (list, dict)
    return renamed, value


_NAME_KEYS = ("method", "judge", "defense")  # keys whose value can be a name alone


def _child(target: Any, key: str, override: str) -> Any:
    """Returns the child of a mapping or list that the next key of an override names. A missing mapping is added."""
    if isinstance(target, list):
        return target[_index(target, key, override)]
    child = target.get(key)
    if isinstance(child, str) and key in _NAME_KEYS:
        child = {"name": child}
    target[key] = child if isinstance(child, dict | list) else {}
    return target[key]


def _index(items: list[Any], key: str, override: str) -> int:
    """Returns the index of the list item with a name, or with an index as text."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    valid = [str(name) for name in names if name is not None]
    raise UserError(
        f"the override {quoted(override)} names the unknown list item {quoted(key, 40)}{nearest(key, valid)}; "
        f"the list has {', '.join(valid) or len(items)}",
        code="invalid-override",
    )


def parse_exponent(value: Any) -> Any:
    """Returns the number of a text such as ``1e-5``, which YAML 1.1 does not parse, and any other value unchanged."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value


def validate(config: type[Config], value: object, source: str) -> Config:
    """Builds a config from plain values.

    Args:
        source: The file or command that the values are from, for error messages.

    Raises:
        UserError: A key is unknown or missing, or a value is invalid. `field` is the key, and the message suggests the
            nearest known key.
    """
    try:
        return config.model_validate(value)
    except ValidationError as error:
        problems = error.errors()
    if problems[0]["type"] == "missing":  # if a key is misspelled, that is why another one is missing
        problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first, *others = problems
    location = first["loc"]
    key = ".".join(map(str, location))
    if first["type"] == "extra_forbidden":
        suggestion = _suggested_key(config, str(location[-1]), _sibling_keys(config, location))
        raise UserError(f"unknown key{suggestion}", code="unknown-key", file=source, field=key)
    if first["type"] == "missing":
        message = f"missing key; add it to the file or pass {key}=..."
        raise UserError(message, code="missing-field", file=source, field=key)
    # A value that may have one of several types fails once for each, and pydantic appends the type to its location.
    siblings = _sibling_keys(config, location)
    same_value = [
        problem
        for problem in others
        if problem["loc"][:-1] == location[:-1]
        and problem["loc"][-1] not in siblings
        and problem["type"] != "extra_forbidden"
    ]
    if same_value and location[-1] not in siblings:
        # The items of a list have the same message.
        message = " or ".join(dict.fromkeys(str(problem["msg"]) for problem in (first, *same_value)))
        field = ".".join(map(str, location[:-1]))
        raise UserError(message, code="invalid-field", file=source, field=field)
    if isinstance(first["input"], bool) and first["type"] in ("string_type", "path_type"):
        message = 'YAML reads on, yes, off and no as true and false. Put the text into quotes, such as "no".'
        raise UserError(message, code="invalid-field", file=source, field=key)
    cause = first.get("ctx", {}).get("error")
    code = cause.code if isinstance(cause, UserError) else "invalid-field"
    raise UserError(first["msg"].removeprefix("Value error, "), code=code, file=source, field=key or None)


def _suggested_key(config: type[BaseModel], key: str, siblings: Sequence[str]) -> str:
    """Returns a suggestion for an unknown key, or the list of valid keys.

    The candidates are, in this order: the same key elsewhere in the config, a key that it abbreviates (``lr`` for
    ``learning_rate``), and the most similar key at the same place.
    """
    paths = [*_paths(config), *(_method_options() if "method" in config.model_fields else ())]
    matches = [path for path in paths if f".{path}".endswith(f".{key}")]
    if not matches:
        matches = [name for name in siblings if _initials(name) == key]
    if not matches:
        matches = [path for path in paths if _initials(path.rpartition(".")[2]) == key]
    if matches:
        return f"; did you mean {' or '.join(map(quoted, matches[:3]))}?"
    return nearest(key, siblings) or f"; valid keys: {', '.join(siblings)}"


def _method_options() -> list[str]:
    """Returns the dotted keys of the options of this package's methods. It imports the methods."""
    options = {option for _, method in METHODS.built_in_items() for option in method.options_type.model_fields}
    return [f"method.{option}" for option in sorted(options)]


def _initials(name: str) -> str:
    """Returns the first letters of a key's words. A key of one word has none."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


def _paths(config: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of a config, except those of the items of lists and mappings."""
    for name, field in config.model_fields.items():
        yield f"{prefix}{name}"
        if typing.get_origin(field.annotation) not in (list, dict):
            for inner in nested_configs(field.annotation):
                yield from _paths(inner, f"{prefix}{name}.")


def _sibling_keys(config: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Returns the valid keys of the config that `location` points into."""
    current: type[BaseModel] = config
    for key in location[:-1]:
        field = current.model_fields.get(str(key))
        if field is not None:
            current = next(nested_configs(field.annotation), current)
    return list(current.model_fields)
