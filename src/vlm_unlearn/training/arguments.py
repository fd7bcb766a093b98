"""The arguments of an unlearning run: those of transformers.TrainingArguments, and the method with its options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from vlm_unlearn.config import DefenseConfig, MethodConfig
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import Method, build_method, method_name
from vlm_unlearn.methods.wrappers import Defense, build_defenses
from vlm_unlearn.training.published_order import BatchLayout

REFERENCES = ("auto", "cache", "adapter", "copy")
FEATURE_CACHES = ("memory", "disk", "off")


UNLIMITED = 2**31 - 1  # tokens of a sample


@dataclass
class UnlearningConfig(TrainingArguments):
    """Arguments of `UnlearningTrainer`. All arguments of transformers.TrainingArguments keep their names.

    `learning_rate` is 1e-5 by default, which suits full training. LoRA needs about ten times as much. `logging_steps`
    is 10. Three arguments have fixed values. ``train_sampling_strategy="sequential"`` makes resumed runs exact, and the
    stream of examples is shuffled already. ``remove_unused_columns=False`` keeps the roles of a batch, and
    ``logging_nan_inf_filter=False`` keeps losses that are not finite visible.

    Raises:
        UserError: The method or one of its options is unknown, or an argument is invalid.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "method_args", "defense"]

    learning_rate: float = field(default=1e-5, metadata={"help": "The peak learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Number of steps between two log entries."})
    method: str = field(
        default="npo",
        metadata={
            "help": "The unlearning method: its name (`vlm-unlearn methods` lists them), `FILE.py:CLASS`, or a class."
        },
    )
    method_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the method, such as `{'beta': 0.5}`."}
    )
    prompt_decouple_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the Prompt Decouple loss (SafeEraser, arXiv 2502.12520). 0 turns it off."},
    )
    accept_refusals: bool = field(
        default=False,
        metadata={"help": "Whether the method may unlearn a forget set of which more than 5 % are refusals."},
    )
    defense: dict[str, Any] | str | list[Any] | None = field(
        default=None,
        metadata={
            "help": "Defenses against relearning: a name, a mapping such as `{'name': 'sam', 'rho': 0.01}`, or a list "
            "of both. `vlm-unlearn methods --defenses` lists them."
        },
    )
    reference: str = field(
        default="auto",
        metadata={
            "help": "How the reference model is provided: `cache` computes likelihoods before training, `adapter` "
            "disables the adapters, `copy` keeps frozen copies of the trainable parameters. `auto` takes the one that "
            "needs the least memory."
        },
    )
    group_by_image: bool | str = field(
        default=False,
        metadata={
            "help": "Whether to order the examples by image, so that a batch contains few images. `retain` orders only "
            "the retain set, so that a batch contains retain questions on the images of its forget questions."
        },
    )
    feature_cache: str = field(
        default="memory",
        metadata={"help": "Where the features of a frozen vision tower are cached: `memory`, `disk` or `off`."},
    )
    feature_cache_gb: float = field(default=4, metadata={"help": "Maximum size of the feature cache in GB."})
    # The next two also accept a truth value and a number. Transformers' command line allows only one type.
    gradient_checkpointing: str | None = field(
        default=None,
        metadata={
            "help": "Whether to compute activations again in the backward pass instead of storing them, which saves "
            "memory and costs time. `auto` does so if the largest batch would not fit into the memory of the device. "
            "`activation_checkpointing` is the same argument.",
            "nargs": "?",
            "const": True,
        },
    )
    tokens_per_pass: str = field(
        default="auto",
        metadata={
            "help": "Number of tokens up to which the micro-batches of an optimizer step run at once. The result is "
            "that of the micro-batches one by one. A larger number needs more memory. 0 runs them one by one. `auto` "
            "is three times the tokens of a micro-batch, and at most 2048."
        },
    )
    max_length: int | None = field(
        default=2048,
        metadata={
            "help": "Maximum length of a sample in tokens. A longer answer is truncated. A longer question is an "
            "error. None truncates nothing."
        },
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the projector. None uses `learning_rate`."}
    )
    freeze_vision_tower: bool = field(
        default=True,
        metadata={"help": "Whether to freeze the vision tower of a model without adapters, as both papers do."},
    )

    def __post_init__(self) -> None:
        if self.max_length is None:
            self.max_length = UNLIMITED
        if isinstance(self.method, type):
            self.method = method_name(self.method)
        self.train_sampling_strategy = "sequential"
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False
        self.label_names = ["forget", "retain"]
        names = ("activation_checkpointing", "gradient_checkpointing")  # the name of transformers, and its older one
        checkpointing = _parse_checkpointing([value for name in names if (value := getattr(self, name)) is not None])
        self.set_gradient_checkpointing(checkpointing is True)
        super().__post_init__()
        self.set_gradient_checkpointing(checkpointing)  # the trainer resolves auto
        self._n_gpu = min(self.n_gpu, 1)  # nn.DataParallel supports neither nested batches nor hooks
        if self.feature_cache is False:  # type: ignore[comparison-overlap]  # as YAML reads off
            self.feature_cache = "off"
        for name, values in (("reference", REFERENCES), ("feature_cache", FEATURE_CACHES)):
            if getattr(self, name) not in values:
                raise UserError(f"must be one of {', '.join(values)}", code="invalid-field", field=name)
        if self.group_by_image not in (True, False, "retain"):
            raise UserError("must be true, false or retain", code="invalid-field", field="group_by_image")
        if self.tokens_per_pass != "auto":
            if not str(self.tokens_per_pass).isdecimal():
                raise UserError("must be auto or a number of tokens", code="invalid-field", field="tokens_per_pass")
            self.tokens_per_pass = int(self.tokens_per_pass)  # type: ignore[assignment]
        if not math.isfinite(self.prompt_decouple_weight) or self.prompt_decouple_weight < 0:
            raise UserError("must be at least 0", code="invalid-field", field="prompt_decouple_weight")
        self.build_method()
        self.build_defenses()

    def set_gradient_checkpointing(self, value: Any) -> None:
        """Sets ``gradient_checkpointing``, under both of its names."""
        self.activation_checkpointing = self.gradient_checkpointing = value

    def build_method(self) -> Method:
        """Returns a new object of the method, wrapped in prompt decoupling if its weight is above 0."""
        options = {"name": self.method, **(self.method_args or {})}  # type: ignore[dict-item]
        return build_method(MethodConfig.model_validate(options), self.prompt_decouple_weight)

    def build_defenses(self) -> tuple[Defense, ...]:
        """Returns new objects of the defenses."""
        configs = [DefenseConfig.model_validate(item) for item in DefenseConfig.expanded(self.defense)]
        return build_defenses(configs)

    @property
    def precision(self) -> str:
        """The precision of the computations: ``bf16``, ``fp16`` or ``fp32``."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    def batch_layout(self) -> BatchLayout:
        """Returns how samples are split into batches."""
        return BatchLayout(self.per_device_train_batch_size, self.gradient_accumulation_steps, self.world_size)

    def samples_per_step(self) -> int:
        """Returns the number of forget samples of an optimizer step, over all processes."""
        return self.batch_layout().samples_per_step


def _parse_checkpointing(values: Sequence[object]) -> bool | Literal["auto"]:
    """Returns the first of the values of `gradient_checkpointing`, which are texts on the command line, or False.

    Raises:
        UserError: The value is invalid.
    """
    text = str(values[0]).lower() if values else "false"
    if text not in ("auto", "true", "false"):
        raise UserError("must be auto, true or false", code="invalid-field", field="gradient_checkpointing")
    return "auto" if text == "auto" else text == "true"
