"""Recipes: what to train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from vlm_unlearn.config.base import DeprecatedNames, Fraction, Positive, Strict
from vlm_unlearn.store import user_path


class MethodConfig(DeprecatedNames):
    """`name` picks the method; the other keys are its options (`vlm-unlearn methods` lists them)."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    renamed_keys: ClassVar[Mapping[str, str]] = {"paper": "paper_compat"}

    name: str
    """The method; `vlm-unlearn methods` lists them with their options."""


class LoraConfig(Strict):
    """Low-rank adapters (Hu et al. 2021); the field names are PEFT's."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}

    r: Annotated[int, Field(gt=0, le=65_536)] = 32
    """Rank."""
    lora_alpha: Positive = 64
    """Scale: the adapters' output is multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapters' inputs that is dropped in training."""
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    """Layers of the language model that get adapters, by the end of their names."""


class TrainableConfig(Strict):
    """What learns. The vision tower is frozen unless `vision_tower` is true."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"parameters": "parameter_patterns"}

    mode: Literal["full", "lora", "qlora"] = "full"
    """`full`: the weights themselves; `lora`: adapters; `qlora`: adapters on a base in 4 bits (NF4), which needs a CUDA GPU."""
    layers: list[int] | None = None
    """For `full`: train these decoder layers only, 0 the first; null: all of the language model."""
    parameter_patterns: list[str] | None = None
    """For `full`: within those layers, the parameters whose names hold one of these; null: all."""
    projector: bool | Literal["sine"] = True
    """The multimodal projector; `sine`: SineProject's frozen W + sin(dW), merged when saved."""
    vision_tower: bool = False
    """Whether the vision tower learns too."""
    lora: LoraConfig = LoraConfig()
    """The adapters, for `lora` and `qlora`."""


Steps = Annotated[int, Field(gt=0, le=100_000_000)]
BatchSize = Annotated[int, Field(gt=0, le=1_000_000)]


class TrainingConfig(Strict):
    """The optimisation; the field names are those of transformers.TrainingArguments where it has one."""

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "scheduler": "lr_scheduler_type",
        "by_image": "group_by_image",
    }

    num_train_epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """Passes over the forget set."""
    max_steps: Steps | None = None
    """Optimizer steps; wins over num_train_epochs."""
    per_device_train_batch_size: BatchSize = 1
    """Forget samples a device and step; as many retain (and decouple) samples."""
    gradient_accumulation_steps: BatchSize = 1
    """Batches that make one optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """The highest learning rate, of AdamW."""
    projector_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """The projector's own learning rate; null: `learning_rate`."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    """How the learning rate moves over the run."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the run's steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay of weights."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are cut to this norm."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the computation; `auto`: bf16 on a GPU, fp32 on a CPU."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """How attention is computed; `auto`: what transformers chooses."""
    gradient_checkpointing: bool = False
    """Computes activations twice instead of holding them: less memory, more time."""
    group_by_image: bool = False
    """Questions on one image come one after the other, so that a batch of them runs the image once."""
    feature_cache: Literal["memory", "disk", "off"] = "memory"
    """Where a frozen vision tower's features of each image are kept, so that it runs each image once."""
    feature_cache_gb: Positive = 4
    """At most this much of them; the tower runs the images of the others again."""
    max_length: Positive = 2048
    """Tokens; a longer answer is cut at its end, a longer question is an error."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that open images and tokenise for the steps to come; 0: the trainer does so itself, between steps."""
    save_steps: Positive = 500
    """Optimizer steps between two checkpoints."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where steps are logged besides log.jsonl and loss.png."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the order of samples, dropout, new adapters and control vectors."""


class Bound(Strict):
    """A condition on a rate: ``{at_most: 0.05}`` or ``{at_least: 0.9}``."""

    at_most: Fraction | None = None
    """Holds up to this share."""
    at_least: Fraction | None = None
    """Holds from this share on."""

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

    renamed_keys: ClassVar[Mapping[str, str]] = {"every": "eval_steps", "groups": "num_questions"}

    suite: Path
    """A suite file, or a shipped one's name; its metrics are what the rules below name."""
    root: Path = Path()
    """What the suite's paths are relative to."""
    eval_steps: Positive = 50
    """Optimizer steps between two probes."""
    num_questions: Positive = 16
    """Questions a case, with all their rewrites; always the same ones."""
    stop_when: dict[str, Bound] = {}
    """The run ends once all of these hold: forgotten enough."""
    abort_when: dict[str, Bound] = {}
    """The run ends as soon as one of these holds: broken."""
    keep_best: dict[str, float] = {}
    """Weight of each metric; the weights with the highest weighted sum are saved, not the last ones."""

    @field_validator("root")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return user_path(value)


class Recipe(Strict):
    """One training run."""

    name: str = ""
    """The run's name in tables; defaults to the method, with +pd where prompts are decoupled."""
    model: str
    """A folder or hub name that AutoModelForImageTextToText loads."""
    data: Path
    """A training-set folder."""
    output: Path
    """The run folder."""
    method: MethodConfig
    """The method and its options; its name alone will do."""
    prompt_decouple_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of SafeEraser's Prompt Decouple loss; 0: the bare method."""
    trainable: TrainableConfig = TrainableConfig()
    """What learns."""
    training: TrainingConfig = TrainingConfig()
    """How it learns."""
    reference: Literal["auto", "cache", "adapter", "copy"] = "auto"
    """Where reference values come from: a file of one number a sample, the base under disabled adapters, or a frozen copy."""
    image_aspect_ratio: Literal["processor", "pad"] = "processor"
    """`processor`: what the model's processor does; `pad`: squares, filled up with the mean colour (LLaVA-1.5's training)."""
    probe: ProbeConfig | None = None
    """A small evaluation every few steps, to stop on what matters."""

    @field_validator("data", "output")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return user_path(value)

    @model_validator(mode="before")
    @classmethod
    def _short_method(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("method"), str):
            return {**value, "method": {"name": value["method"]}}
        return value
