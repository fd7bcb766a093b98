"""Recipes (what to train) and suites (what to measure): YAML plus dotted overrides. Unknown keys are refused."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlm_unlearn.errors import RequestError, nearest
from vlm_unlearn.records import Kind, Label

Config = TypeVar("Config", bound=BaseModel)
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]  # of a whole, not percent


class Strict(BaseModel):
    """Base of every config: no unknown keys, values can't be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MethodConfig(BaseModel):
    """`name` picks the method; the other keys are its options (`vlm-unlearn methods` lists them)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str


class LoraConfig(Strict):
    """Low-rank adapters (Hu et al. 2021); the field names are PEFT's."""

    r: Annotated[int, Field(gt=0, le=65_536)] = 32
    alpha: Positive = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class TrainableConfig(Strict):
    """What learns. The vision tower is frozen unless `vision_tower` is true."""

    mode: Literal["full", "lora", "qlora"] = "full"  # qlora: adapters on a base in 4 bits (NF4); needs a CUDA GPU
    layers: list[int] | None = None  # full: train these decoder layers only; None = all of the language model
    parameters: list[str] | None = None  # full: within those layers, names that hold one of these; None = all
    projector: bool | Literal["sine"] = True  # the multimodal projector; sine: SineProject's frozen W + sin(dW), merged when saved
    vision_tower: bool = False
    lora: LoraConfig = LoraConfig()


Steps = Annotated[int, Field(gt=0, le=100_000_000)]
Batch = Annotated[int, Field(gt=0, le=1_000_000)]


class TrainingConfig(Strict):
    """The optimisation; the field names are those of transformers.TrainingArguments where it has one."""

    epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0  # passes over the forget set
    max_steps: Steps | None = None  # optimizer steps; wins over epochs
    batch_size: Batch = 1  # forget samples a device and step; as many retain (and decouple) samples
    gradient_accumulation_steps: Batch = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    projector_learning_rate: Annotated[float, Field(gt=0)] | None = None  # the projector's own; None = learning_rate
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"  # auto: what transformers chooses
    gradient_checkpointing: bool = False
    max_length: Positive = 2048  # tokens; a longer answer is cut at its end, a longer question is an error
    save_steps: Positive = 500
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []  # besides log.jsonl and loss.png
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Bound(Strict):
    """A condition on a rate: ``{at_most: 0.05}`` or ``{at_least: 0.9}``."""

    at_most: Share | None = None
    at_least: Share | None = None

    @model_validator(mode="after")
    def _one(self) -> Bound:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("give at_most or at_least")
        return self

    def holds(self, value: float | None) -> bool:
        """Whether a rate that was measured is within the bound."""
        if value is None:
            return False
        return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)


class ProbeConfig(Strict):
    """A small evaluation every few steps, since unlearning overshoots."""

    suite: Path  # a suite file, or a shipped one's name; its metrics are what the rules below name
    root: Path = Path()  # what the suite's paths are relative to
    every: Positive = 50  # optimizer steps
    groups: Positive = 16  # questions a case, with all their rewrites; always the same ones
    stop_when: dict[str, Bound] = {}  # the run ends once all of these hold: forgotten enough
    abort_when: dict[str, Bound] = {}  # the run ends as soon as one of these holds: broken
    keep_best: dict[str, float] = {}  # weight of each metric; the weights with the highest weighted sum are saved, not the last ones

    @field_validator("root")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()


class Recipe(Strict):
    """One training run."""

    name: str = ""  # the run's name in tables; defaults to the method, with +pd where prompts are decoupled
    model: str  # a folder or hub name that AutoModelForImageTextToText loads
    data: Path  # a training-set folder
    output: Path  # the run folder
    method: MethodConfig
    prompt_decouple_weight: Annotated[float, Field(ge=0)] = 0.0  # SafeEraser's Prompt Decouple loss; 0 = the bare method
    trainable: TrainableConfig = TrainableConfig()
    training: TrainingConfig = TrainingConfig()
    reference: Literal["auto", "cache", "adapter", "copy"] = "auto"  # where reference values come from
    image_aspect_ratio: Literal["processor", "pad"] = "processor"  # pad: squares, filled up with the mean colour (LLaVA-1.5's training)
    probe: ProbeConfig | None = None

    @field_validator("data", "output")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()

    @model_validator(mode="before")
    @classmethod
    def _short_method(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("method"), str):
            return {**value, "method": {"name": value["method"]}}
        return value


class RewriteConfig(Strict):
    """The one-word attack: every question becomes `shots` questions that start with `trigger`."""

    trigger: Literal["what", "share"]
    shots: Annotated[int, Field(gt=0, le=5)] = 1


class CaseConfig(Strict):
    """One set of prompts."""

    name: str
    format: Literal["vlguard", "safe_eraser"]
    file: Path
    images: Path
    kind: Kind
    rewrite: RewriteConfig | None = None


class MetricConfig(Strict):
    """A rate over cases. `group: any` counts a question once, as soon as one of its shots or samples has the label."""

    cases: list[str]
    labels: list[Label]  # the labels that count
    group: Literal["any", "each"] = "each"


class JudgeConfig(Strict):
    """Who grades. `world` is needed by `tiny_world` only; `paper` gives the keyword judge its published counting."""

    name: Literal["keyword", "tiny_world"]
    world: Path | None = None
    paper: bool = False


class GenerationConfig(Strict):
    """Greedy decoding."""

    max_new_tokens: Positive = 256
    batch_size: Positive = 8
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU


class Suite(Strict):
    """What to measure on a model."""

    model: str  # a model folder, hub name, adapter folder or training run
    root: Path = Path()  # what the paths below are relative to
    cases: Annotated[list[CaseConfig], Field(min_length=1)]
    judge: JudgeConfig
    metrics: dict[str, MetricConfig]
    generation: GenerationConfig = GenerationConfig()

    @model_validator(mode="after")
    def _paths_below_root(self) -> Suite:
        root = self.root.expanduser()
        for case in self.cases:
            object.__setattr__(case, "file", (root / case.file).absolute())
            object.__setattr__(case, "images", (root / case.images).absolute())
        if self.judge.world is not None:
            object.__setattr__(self.judge, "world", (root / self.judge.world).absolute())
        object.__setattr__(self, "root", Path())  # resolved, once
        return self

    @model_validator(mode="after")
    def _metrics_name_cases(self) -> Suite:
        names = [case.name for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError("two cases have the same name")
        for metric, config in self.metrics.items():
            for case in config.cases:
                if case not in names:
                    raise ValueError(f'metric "{metric}" names the case "{case}", which is not there{nearest(case, names)}')
        return self


_SHIPPED = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes")  # installed, or a source checkout


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
    where = f"{path} (extends {', '.join(bases)})" if bases else str(path)
    return validate(config, {**override(value, overrides), **(values or {})}, where)


class _EachKeyOnce(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, (named, _) in reversed(list(zip(keys, node.value, strict=True))):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'the key "{key}" is there twice', named.start_mark)
        return super().construct_mapping(node, deep)


def _shipped_names() -> list[str]:
    """The recipes and suites that come with the package, by the names they are called by."""
    return [
        str(file.relative_to(folder))[: -len(".yaml")]
        for folder in _SHIPPED
        for file in sorted(folder.rglob("*.yaml"))
        if not file.stem.startswith("_") and file.parent.name != "engines"
    ]


def _read(path: Path, readers: tuple[Path, ...]) -> tuple[dict[str, Any], list[str]]:
    """A file's keys over those of the file it extends, and the names extended; `readers` are the files that led here."""
    if path.resolve() in (reader.resolve() for reader in readers):
        raise RequestError(f"{readers[-1]}: extends goes in a circle: {' -> '.join(map(str, (*readers, path)))}")
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachKeyOnce)
    except OSError as error:
        near = nearest(str(path), _shipped_names()) if isinstance(error, FileNotFoundError) else ""
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
        target = value
        for parent in parents:
            found = target.get(parent)
            if isinstance(found, str) and parent == "method":
                found = {"name": found}
            target[parent] = found if isinstance(found, dict) else {}
            target = target[parent]
        if last == "method" and not parents and isinstance(parsed, str):
            parsed = {"name": parsed}
        target[last] = parsed
    return value


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
        first, *others = error.errors()
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
            raise RequestError(f'{where}: unknown key "{key}"{nearest(str(first["loc"][-1]), known)}') from None
        if first["type"] == "missing":
            raise RequestError(f'{where}: key "{key}" is missing; add it to the file or pass {key}=...') from None
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{where}: {key + ': ' if key else ''}{message}") from None


def _keys_beside(config: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that are allowed where `location` points."""
    current: type[BaseModel] = config
    for part in location[:-1]:
        field = current.model_fields.get(str(part))
        if field is not None:
            current = next(_models_in(field.annotation), current)
    return list(current.model_fields)


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
