"""Recipes: what to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vlm_unlearn.config.base import Positive, Share, Strict


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
    by_image: bool = False  # questions on one image come one after the other, so that a batch of them runs the image once
    feature_cache: Literal["memory", "disk", "off"] = "memory"  # where a frozen vision tower's features of each image are kept
    feature_cache_gb: Positive = 2  # at most this much; the longest unused go first
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
