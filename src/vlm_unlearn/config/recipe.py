"""Recipes: the model, data, method and hyperparameters of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from vlm_unlearn import plugins
from vlm_unlearn.config.base import DeprecatedNames, PluginName, Positive, Strict
from vlm_unlearn.errors import UserError
from vlm_unlearn.records import Fraction
from vlm_unlearn.store import user_path


class MethodConfig(DeprecatedNames):
    """The unlearning method. `name` selects it, and the other keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    renamed_keys: ClassVar[Mapping[str, str]] = {"paper": "paper_compat"}

    name: Annotated[str, PluginName(plugins.METHODS)]
    """Name of the method, or `FILE.py:CLASS`. `vlm-unlearn methods` lists the methods with their options."""


class DefenseConfig(DeprecatedNames):
    """A defense against relearning. `name` selects it, and the other keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, PluginName(plugins.DEFENSES)]
    """Name of the defense, or `FILE.py:CLASS`. `vlm-unlearn methods --defenses` lists them with their options."""

    @staticmethod
    def expanded(value: Any) -> Any:
        """Returns a list of configs, given as a name, a mapping, a list of both, or None for no defense."""
        if value is None:
            return []
        items = list(value) if isinstance(value, list | tuple) else [value]
        return [{"name": item} if isinstance(item, str) else item for item in items]


class LoraConfig(Strict):
    """Low-rank adapters (Hu et al. 2021). The field names are those of PEFT."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}

    r: Annotated[int, Field(gt=0, le=65_536)] = 32
    """Rank of the adapters."""
    lora_alpha: Positive = 64
    """Scale of the adapters. Their output is multiplied by `lora_alpha / r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of the adapters' inputs in training."""
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    """Layers of the language model that get adapters, by the last component of their names."""


class TrainableConfig(Strict):
    """The trainable parameters. The vision tower is frozen unless `vision_tower` is true."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"parameters": "parameter_patterns"}

    mode: Literal["full", "lora", "qlora"] = "full"
    """`full` trains the weights, `lora` trains adapters, and `qlora` trains adapters on a base in 4 bits (NF4).

    `qlora` needs a CUDA GPU.
    """
    layers: list[int] | None = None
    """For `full`: the decoder layers to train, counted from 0. Null trains the entire language model."""
    parameter_patterns: list[str] | None = None
    """For `full`: train only parameters of those layers whose names contain one of these texts. Null trains all."""
    projector: bool | Literal["sine"] = True
    """Whether the multimodal projector is trained. `sine` trains SineProject's W + sin(dW), merged when saved."""
    vision_tower: bool = False
    """Whether the vision tower is trained."""
    lora: LoraConfig = LoraConfig()
    """Adapters of the modes `lora` and `qlora`."""


Steps = Annotated[int, Field(gt=0, le=100_000_000)]
BatchSize = Annotated[int, Field(gt=0, le=1_000_000)]


class TrainingConfig(Strict):
    """Hyperparameters of the training run.

    A field that transformers.TrainingArguments also has carries the name that it has there.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "scheduler": "lr_scheduler_type",
        "by_image": "group_by_image",
    }

    num_train_epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """Number of passes over the forget set."""
    max_steps: Steps | None = None
    """Number of optimizer steps. If it is set, `num_train_epochs` has no effect."""
    per_device_train_batch_size: BatchSize = 1
    """Forget samples per device and batch. The batch has as many retain samples, and as many decouple samples."""
    gradient_accumulation_steps: BatchSize = 1
    """Number of batches per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of AdamW."""
    projector_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the projector. Null uses `learning_rate`."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    """Learning-rate schedule."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Fraction of the steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Maximum gradient norm. Larger gradients are clipped."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the forward and backward pass. `auto` is bf16 on a GPU and fp32 on a CPU."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation. `auto` is the default of transformers."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Recompute activations in the backward pass instead of storing them. It saves memory and costs time.

    `auto` recomputes them only if the largest batch would not fit into the memory of the device.
    """
    tokens_per_pass: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Number of tokens up to which the batches of an optimizer step run at once, with the result of one after another.

    A larger number takes more memory and less time. 0 runs each batch alone. `auto` is three times the tokens of a
    batch, and at most 2048.
    """
    group_by_image: bool | Literal["retain"] = False
    """Order the samples by image, so that the questions of a batch on the same image run it once.

    `retain` orders only the retain set, so that its questions are on the images of the forget questions of their batch.
    """
    feature_cache: Literal["memory", "disk", "off"] = "memory"
    """Where to cache the image features of a frozen vision tower, so that it runs each image once."""
    feature_cache_gb: Positive = 4
    """Maximum size of the feature cache in GB. Images that do not fit run through the tower each time."""
    max_length: Positive = 2048
    """Maximum length of a sample in tokens. A longer answer is truncated, and a longer question is an error."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Number of processes that load images and tokenize ahead of the training steps. 0 loads in the main process."""
    save_steps: Positive = 500
    """Number of optimizer steps between two checkpoints."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Services that log the steps, in addition to log.jsonl and loss.png."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sample order, dropout, adapter initialization and control vectors."""


class Bound(Strict):
    """A condition on a rate: ``{at_most: 0.05}`` or ``{at_least: 0.9}``."""

    at_most: Fraction | None = None
    """The condition holds up to this rate."""
    at_least: Fraction | None = None
    """The condition holds from this rate on."""

    @model_validator(mode="after")
    def _check_single_bound(self) -> Bound:
        if (self.at_most is None) == (self.at_least is None):
            raise UserError("needs either `at_most` or `at_least`", code="conflicting-settings")
        return self

    def holds(self, value: float | None) -> bool:
        """Returns whether a measured rate fulfills the condition. A rate of None does not."""
        if value is None:
            return False
        return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)


class ProbeConfig(Strict):
    """A small evaluation at regular intervals of training, to stop before unlearning degrades the model."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"every": "eval_steps", "groups": "num_questions"}

    suite: Path
    """A suite file, or the name of a shipped suite. The rules below refer to its metrics."""
    root: Path = Path()
    """Folder that the paths of the suite are relative to."""
    eval_steps: Positive = 50
    """Number of optimizer steps between two evaluations."""
    num_questions: Positive = 16
    """Number of questions per split, with all their rewrites. Every evaluation uses the same questions."""
    stop_when: dict[str, Bound] = {}
    """Conditions that stop the run successfully as soon as all of them hold."""
    abort_when: dict[str, Bound] = {}
    """Conditions that abort the run as soon as one of them holds."""
    keep_best: dict[str, float] = {}
    """Factor of each metric. The checkpoint with the highest weighted sum is saved instead of the last one."""

    @field_validator("root")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return user_path(value)


class Recipe(Strict):
    """A training run: model, data, method, trainable parameters and hyperparameters."""

    name: str = ""
    """Name of the run in tables. The default is the method, `+pd` if prompts are decoupled, and the defenses."""
    model: str
    """A model folder or hub name that AutoModelForImageTextToText loads."""
    data: Path
    """The training-set folder."""
    output: Path
    """The run folder to write."""
    method: MethodConfig
    """The method and its options, or only the name of the method."""
    accept_refusals: bool = False
    """Whether the method may unlearn a forget set of which more than 5 % of the answers are refusals."""
    prompt_decouple_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of SafeEraser's Prompt Decouple loss. 0 turns it off."""
    defense: list[DefenseConfig] = []
    """Defenses against relearning, such as `{name: sam, rho: 0.01}`. A defense can be given by its name alone."""
    trainable: TrainableConfig = TrainableConfig()
    """The trainable parameters."""
    training: TrainingConfig = TrainingConfig()
    """Hyperparameters."""
    reference: Literal["auto", "cache", "adapter", "copy"] = "auto"
    """Source of the reference model's values.

    `cache` is a file with one number per sample, `adapter` is the base model with disabled adapters, and `copy` is a
    frozen copy of the trainable parameters.
    """
    image_aspect_ratio: Literal["processor", "pad"] = "processor"
    """`processor` leaves images to the model's processor. `pad` pads them to squares with the mean color.

    LLaVA-1.5 was trained with `pad`.
    """
    image_loader: Literal["viewer", "llava"] = "viewer"
    """`viewer` opens images as image viewers show them. `llava` opens them as LLaVA's own code does.

    LLaVA's code ignores the EXIF orientation, drops transparency and clips samples of more than 8 bits.
    """
    probe: ProbeConfig | None = None
    """A small evaluation at regular intervals, with rules that stop the run."""

    @field_validator("data", "output")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return user_path(value)

    @field_validator("defense", mode="before")
    @classmethod
    def _expand_defenses(cls, value: Any) -> Any:
        return DefenseConfig.expanded(value)

    @model_validator(mode="before")
    @classmethod
    def _expand_method_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("method"), str):
            return {**value, "method": {"name": value["method"]}}
        return value
