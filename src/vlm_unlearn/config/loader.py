"""Reads configs: YAML files that may extend each other, plus dotted overrides."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vlm_unlearn.config.base import nested_configs, rename_deprecated
from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.store import describe_path

Config = TypeVar("Config", bound=BaseModel)

_SHIPPED = (
    Path(__file__).parents[1] / "recipes",
    Path(__file__).parents[3] / "recipes",
)  # installed, or a source checkout


def shipped_path(name: str | Path) -> Path:
    """A recipe's or suite's file: a path, or the name of one that comes with the package, such as ``tiny/npo``."""
    path = Path(name)
    if path.is_file() or not path.name:
        return path
    for folder in _SHIPPED:
        found = folder / _as_yaml(path)
        if found.is_file():
            return found
    return path


def load(
    config: type[Config], path: Path, overrides: Sequence[str] = (), values: Mapping[str, object] | None = None
) -> Config:
    """Reads a YAML file into a config, with ``key.sub=value`` overrides (values are YAML too).

    Args:
        values: top-level keys with values that are taken as they are, such as paths.

    The top-level key ``extends: NAME`` reads another file first: one beside this file (``.yaml`` may be left out) or a shipped one.
    Mappings merge, and everything else replaces what the base says; so does a mapping whose ``name`` differs, such as another method.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the nearest right one is named), or a value is wrong.
    """
    path = shipped_path(path)
    value, bases = _read(path, (), config)
    for mark, what in _MARKS.items():
        if mark in value and mark not in config.model_fields:
            raise UserError(f"{path}: is {what}")
    where = f"{path} (extends {', '.join(bases)})" if bases else str(path)
    return validate(config, {**apply_overrides(value, overrides, config), **(values or {})}, where)


_MARKS = {"method": "a recipe, for `vlm-unlearn train`", "metrics": "a suite, for `vlm-unlearn evaluate`"}


class _EachKeyOnce(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, (named, _) in reversed(list(zip(keys, node.value, strict=True))):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'the key "{key}" is there twice', named.start_mark)
        return super().construct_mapping(node, deep)


def shipped_names() -> list[str]:
    """The recipes and suites that come with the package, by the names they are called by."""
    return [
        str(file.relative_to(folder))[: -len(".yaml")]
        for folder in _SHIPPED
        for file in sorted(folder.rglob("*.yaml"))
        if not file.stem.startswith("_") and file.parent.name != "engines"
    ]


def _nearest_shipped(path: Path) -> str:
    """The shipped name that may be meant: one that ends so, else the closest."""
    names = shipped_names()
    same = [name for name in names if Path(name).name == path.name.removesuffix(".yaml")]
    return nearest(same[0] if same else str(path), names)


def read_resolved(name: str | Path) -> dict[str, Any]:
    """A YAML file's keys over those of the files it extends.

    Raises:
        UserError: as `load`.
    """
    return _read(shipped_path(name), ())[0]


def starter_text(name: str) -> str:
    """A shipped file's text for a file of one's own elsewhere: what it extends is named so that it is found from there.

    Raises:
        UserError: no file of that name is shipped; the nearest one is named.
    """
    name = name.removesuffix(".yaml")
    if name not in shipped_names():
        raise UserError(
            f"no recipe or suite {quoted(name)} is shipped{nearest(name, shipped_names())}; `vlm-unlearn recipes` lists them"
        )
    text = shipped_path(name).read_text(encoding="utf-8")
    return re.sub(r"^extends: *(?=[\w.-]+ *$)", f"extends: {Path(name).parent}/", text, flags=re.MULTILINE)


def _read(
    path: Path, readers: tuple[Path, ...], config: type[BaseModel] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Returns a file's keys over those of the file it extends, and the names of the extended files.

    Args:
        readers: The files that led here by ``extends``, to detect a circle.
        config: Renames the deprecated keys of each file to those of this config, so that old and new names merge.
    """
    if path.resolve() in (reader.resolve() for reader in readers):
        raise UserError(f"{readers[-1]}: extends goes in a circle: {' -> '.join(map(str, (*readers, path)))}")
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachKeyOnce)
    except OSError as error:
        near = _nearest_shipped(path) if isinstance(error, FileNotFoundError) else describe_path(path)
        raise UserError(
            f"{path}: {error.strerror}{near}" + (f" ({readers[-1]} extends it)" if readers else "")
        ) from None
    except Exception as error:  # PyYAML lets dates, numbers and nesting that it can't read raise whatever they raise
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys and values, such as `method: npo`")
    if isinstance(value.get("method"), str):
        value["method"] = {"name": value["method"]}
    name = value.pop("extends", None)
    if config is not None:
        value = _renamed(config, value, str(path))
    if name is None:
        return value, []
    if not isinstance(name, str) or not Path(name).name or not name.isprintable():
        raise UserError(f"{path}: extends: expected one name, such as `extends: npo_7b`")
    beside = path.parent / name
    base = next((found for found in (beside, _as_yaml(beside)) if found.is_file()), shipped_path(name))
    below, bases = _read(base, (*readers, path), config)
    return _merged(below, value), [name, *bases]


def _as_yaml(path: Path) -> Path:
    return (
        path if path.suffix == ".yaml" else path.with_name(path.name + ".yaml")
    )  # with_suffix would cut llama_3.2 at its dot


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        old, new = below[key], above[key]
        if isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) == old.get("name"):
            merged[key] = _merged(old, new)
    return merged


def _renamed(config: type[BaseModel], value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the mapping with the current names of deprecated keys."""
    try:
        return rename_deprecated(config, value)
    except ValueError as error:
        raise UserError(f"{where}: {error}", code="duplicate-key") from None


def apply_overrides(
    value: dict[str, Any], overrides: Sequence[str], config: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Applies ``key.sub=value`` overrides to a nested mapping and returns the mapping.

    Args:
        config: Renames the deprecated keys of the mapping and of the overrides to those of this config.

    Raises:
        UserError: An override is not ``key=value``, its value is not YAML, or a list has no such item.
    """
    if config is not None:
        value = _renamed(config, value, "config")
    for text in overrides:
        dotted, equals, raw = text.partition("=")
        if not equals or not dotted.strip():
            raise UserError(f'override "{text}": write key=value, for example training.learning_rate=1e-5')
        try:
            parsed = _number_or_same(yaml.safe_load(raw))
        except Exception:  # as in load
            raise UserError(f'override "{text[:80]}": the value is not valid YAML') from None
        keys = dotted.strip().split(".")
        if config is not None:
            keys, parsed = _current_names(config, keys, parsed)
        *parents, last = keys
        target: Any = value
        for parent in parents:
            target = _child(target, parent, text)
        if isinstance(target, list):
            target[_place(target, last, text)] = parsed
            continue
        if last in _NAMED and not parents and isinstance(parsed, str):
            parsed = {"name": parsed}
        target[last] = parsed
    return value


def _current_names(config: type[BaseModel], keys: Sequence[str], value: Any) -> tuple[list[str], Any]:
    """Renames the deprecated keys of an override's path, and its value if that is deprecated."""
    current: type[BaseModel] | None = config
    renamed: list[str] = []
    items = False  # whether the next key names an item of a list or mapping of configs
    for number, key in enumerate(keys):
        if current is None or items:
            renamed.append(key)
            items = False
            continue
        last = number == len(keys) - 1
        (new, new_value), *_ = rename_deprecated(current, {key: value if last else None}).items()
        renamed.append(new)
        value = new_value if last else value
        field = current.model_fields.get(new)
        current = next(nested_configs(field.annotation), None) if field is not None else None
        items = field is not None and typing.get_origin(field.annotation) in (list, dict)
    return renamed, value


_NAMED = ("method", "judge")  # keys whose value may be a name alone


def _child(target: Any, part: str, text: str) -> Any:
    """What a dotted override goes into: a mapping's key, made where it isn't there, or an item of a list, by its number or its name."""
    if isinstance(target, list):
        return target[_place(target, part, text)]
    found = target.get(part)
    if isinstance(found, str) and part in _NAMED:
        found = {"name": found}
    target[part] = found if isinstance(found, dict | list) else {}
    return target[part]


def _place(items: list[Any], part: str, text: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    known = [str(name) for name in names if name is not None]
    raise UserError(
        f'override "{text[:80]}": there is no "{part[:40]}"{nearest(part, known)}; the list has {", ".join(known) or len(items)}'
    )


def _number_or_same(value: Any) -> Any:
    # YAML 1.1 reads 1e-5 as text.
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value


def validate(config: type[Config], value: object, where: str) -> Config:
    """Builds a config from plain values.

    Raises:
        UserError: one line that names the key, what is wrong with it, and for an unknown key the nearest right one.
    """
    try:
        return config.model_validate(value)
    except ValidationError as error:
        found = error.errors()
        if found[0]["type"] == "missing":  # a misspelt key is why
            found.sort(key=lambda one: one["type"] != "extra_forbidden")
        first, *others = found
        # A value that may be of several kinds fails once for each, and each names its kind as if it were a key.
        known = _keys_beside(config, first["loc"])
        kinds = [
            other
            for other in others
            if other["loc"][:-1] == first["loc"][:-1]
            and other["loc"][-1] not in known
            and other["type"] != "extra_forbidden"
        ]
        if kinds and first["loc"][-1] not in known and first["type"] != "extra_forbidden":
            key = ".".join(map(str, first["loc"][:-1]))
            told = " or ".join(str(kind["msg"]) for kind in (first, *kinds))
            raise UserError(f"{where}: {key}: {told}") from None
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f'{where}: unknown key "{key}"{_meant(config, str(first["loc"][-1]), known)}') from None
        if first["type"] == "missing":
            raise UserError(f'{where}: key "{key}" is missing; add it to the file or pass {key}=...') from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}") from None


_OF_METHODS = (
    "beta",
    "gamma",
    "forget_weight",
    "retain_weight",
    "paper_compat",
)  # options; a recipe's class doesn't hold them


def _meant(config: type[BaseModel], key: str, beside: Sequence[str]) -> str:
    """The right key for an unknown one: what others call so, the same key elsewhere in the config, or the nearest beside it."""
    options = [f"method.{option}" for option in _OF_METHODS] if "method" in config.model_fields else []
    same = [path for path in (*_paths(config), *options) if f".{path}".endswith(f".{key}")]
    if same:
        return f"; did you mean {' or '.join(map(quoted, same[:3]))}?"
    return nearest(key, beside) or f"; valid keys: {', '.join(beside)}"


def _paths(config: type[BaseModel], before: str = "") -> Iterator[str]:
    """The dotted keys that an override can give, but for those of lists' items."""
    for name, field in config.model_fields.items():
        yield f"{before}{name}"
        if typing.get_origin(field.annotation) not in (list, dict):
            for inner in nested_configs(field.annotation):
                yield from _paths(inner, f"{before}{name}.")


def _keys_beside(config: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that are allowed where `location` points."""
    current: type[BaseModel] = config
    for part in location[:-1]:
        field = current.model_fields.get(str(part))
        if field is not None:
            current = next(nested_configs(field.annotation), current)
    return list(current.model_fields)
