"""Reads configs: YAML files that may extend each other, plus dotted overrides."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vlm_unlearn.errors import RequestError, nearest, shown
from vlm_unlearn.store import what_it_is

Config = TypeVar("Config", bound=BaseModel)

_SHIPPED = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[3] / "recipes")  # installed, or a source checkout


def shipped(name: str | Path) -> Path:
    """A recipe's or suite's file: a path, or the name of one that comes with the package, such as ``tiny/npo``."""
    path = Path(name)
    if path.is_file() or not path.name:
        return path
    for folder in _SHIPPED:
        found = folder / _as_yaml(path)
        if found.is_file():
            return found
    return path


def load(config: type[Config], path: Path, overrides: Sequence[str] = (), values: Mapping[str, object] | None = None) -> Config:
    """Reads a YAML file into a config, with ``key.sub=value`` overrides (values are YAML too).

    Args:
        values: top-level keys with values that are taken as they are, such as paths.

    The top-level key ``extends: NAME`` reads another file first: one beside this file (``.yaml`` may be left out) or a shipped one.
    Mappings merge, and everything else replaces what the base says; so does a mapping whose ``name`` differs, such as another method.

    Raises:
        RequestError: the file is missing or not YAML, a key is unknown (the nearest right one is named), or a value is wrong.
    """
    path = shipped(path)
    value, bases = _read(path, ())
    for mark, what in _MARKS.items():
        if mark in value and mark not in config.model_fields:
            raise RequestError(f"{path}: is {what}")
    where = f"{path} (extends {', '.join(bases)})" if bases else str(path)
    return validate(config, {**override(value, overrides), **(values or {})}, where)


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


def resolved(name: str | Path) -> dict[str, Any]:
    """A YAML file's keys over those of the files it extends.

    Raises:
        RequestError: as `load`.
    """
    return _read(shipped(name), ())[0]


def to_start_from(name: str) -> str:
    """A shipped file's text for a file of one's own elsewhere: what it extends is named so that it is found from there.

    Raises:
        RequestError: no file of that name is shipped; the nearest one is named.
    """
    name = name.removesuffix(".yaml")
    if name not in shipped_names():
        raise RequestError(f"no recipe or suite {shown(name)} is shipped{nearest(name, shipped_names())}; `vlm-unlearn recipes` lists them")
    text = shipped(name).read_text(encoding="utf-8")
    return re.sub(r"^extends: *(?=[\w.-]+ *$)", f"extends: {Path(name).parent}/", text, flags=re.MULTILINE)


def _read(path: Path, readers: tuple[Path, ...]) -> tuple[dict[str, Any], list[str]]:
    """A file's keys over those of the file it extends, and the names extended; `readers` are the files that led here."""
    if path.resolve() in (reader.resolve() for reader in readers):
        raise RequestError(f"{readers[-1]}: extends goes in a circle: {' -> '.join(map(str, (*readers, path)))}")
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachKeyOnce)
    except OSError as error:
        near = _nearest_shipped(path) if isinstance(error, FileNotFoundError) else what_it_is(path)
        raise RequestError(f"{path}: {error.strerror}{near}" + (f" ({readers[-1]} extends it)" if readers else "")) from None
    except Exception as error:  # PyYAML lets dates, numbers and nesting that it can't read raise whatever they raise
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise RequestError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path}: expected keys and values, such as `method: npo`")
    if isinstance(value.get("method"), str):
        value["method"] = {"name": value["method"]}
    if "extends" not in value:
        return value, []
    name = value.pop("extends")
    if not isinstance(name, str) or not Path(name).name or not name.isprintable():
        raise RequestError(f"{path}: extends: expected one name, such as `extends: npo_7b`")
    beside = path.parent / name
    base = next((found for found in (beside, _as_yaml(beside)) if found.is_file()), shipped(name))
    below, bases = _read(base, (*readers, path))
    return _merged(below, value), [name, *bases]


def _as_yaml(path: Path) -> Path:
    return path if path.suffix == ".yaml" else path.with_name(path.name + ".yaml")  # with_suffix would cut llama_3.2 at its dot


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        old, new = below[key], above[key]
        if isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) == old.get("name"):
            merged[key] = _merged(old, new)
    return merged


def override(value: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies ``key.sub=value`` overrides to a nested mapping, which is changed and returned."""
    for text in overrides:
        dotted, equals, raw = text.partition("=")
        if not equals or not dotted.strip():
            raise RequestError(f'override "{text}": write key=value, for example training.learning_rate=1e-5')
        try:
            parsed = _number_or_same(yaml.safe_load(raw))
        except Exception:  # as in load
            raise RequestError(f'override "{text[:80]}": the value is not valid YAML') from None
        *parents, last = dotted.strip().split(".")
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
    raise RequestError(
        f'override "{text[:80]}": there is no "{part[:40]}"{nearest(part, known)}; the list has {", ".join(known) or len(items)}'
    )


def _number_or_same(value: Any) -> Any:
    # YAML 1.1 reads 1e-5 as text.
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value


def validate(config: type[Config], value: object, where: str) -> Config:
    """Builds a config from plain values.

    Raises:
        RequestError: one line that names the key, what is wrong with it, and for an unknown key the nearest right one.
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
            if other["loc"][:-1] == first["loc"][:-1] and other["loc"][-1] not in known and other["type"] != "extra_forbidden"
        ]
        if kinds and first["loc"][-1] not in known and first["type"] != "extra_forbidden":
            key = ".".join(map(str, first["loc"][:-1]))
            told = " or ".join(str(kind["msg"]) for kind in (first, *kinds))
            raise RequestError(f"{where}: {key}: {told}") from None
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RequestError(f'{where}: unknown key "{key}"{_meant(config, str(first["loc"][-1]), known)}') from None
        if first["type"] == "missing":
            raise RequestError(f'{where}: key "{key}" is missing; add it to the file or pass {key}=...') from None
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{where}: {key + ': ' if key else ''}{message}") from None


# What transformers, PEFT, TRL and LLaVA's scripts call some of our keys.
_ELSEWHERE = {
    **dict.fromkeys(("lr", "learning-rate"), "learning_rate"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_batch_size", "train_batch_size", "bs"), "batch_size"),
    **dict.fromkeys(("grad_accum", "gradient_accumulation", "accumulation_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "scheduler"),
    **dict.fromkeys(("bf16", "fp16", "dtype", "torch_dtype"), "precision"),
    **dict.fromkeys(("lora_r", "lora_rank", "rank"), "lora.r"),
    **dict.fromkeys(("model_name_or_path", "model_path", "base_model"), "model"),
    **dict.fromkeys(("output_dir", "out", "save_dir"), "output"),
    **dict.fromkeys(("data_path", "dataset", "train_data"), "data"),
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "model_max_length": "max_length",
    "mm_projector_lr": "projector_learning_rate",
}
_OF_METHODS = ("beta", "gamma", "forget_weight", "retain_weight", "paper")  # options; a recipe's class doesn't hold them


def _meant(config: type[BaseModel], key: str, beside: Sequence[str]) -> str:
    """The right key for an unknown one: what others call so, the same key elsewhere in the config, or the nearest beside it."""
    name = _ELSEWHERE.get(key, key)
    if name in beside:
        return f"; did you mean {shown(name)}?"
    options = [f"method.{option}" for option in _OF_METHODS] if "method" in config.model_fields else []
    same = [path for path in (*_paths(config), *options) if f".{path}".endswith(f".{name}")]
    return f"; did you mean {' or '.join(map(shown, same[:3]))}?" if same else nearest(key, beside)


def _paths(config: type[BaseModel], before: str = "") -> Iterator[str]:
    """The dotted keys that an override can give, but for those of lists' items."""
    for name, field in config.model_fields.items():
        yield f"{before}{name}"
        if typing.get_origin(field.annotation) not in (list, dict):
            for inner in models_in(field.annotation):
                yield from _paths(inner, f"{before}{name}.")


def _keys_beside(config: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that are allowed where `location` points."""
    current: type[BaseModel] = config
    for part in location[:-1]:
        field = current.model_fields.get(str(part))
        if field is not None:
            current = next(models_in(field.annotation), current)
    return list(current.model_fields)


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The configs that a field's type names, such as `CaseConfig` in ``list[CaseConfig]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from models_in(argument)
