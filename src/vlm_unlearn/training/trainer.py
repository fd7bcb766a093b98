"""The trainer of notebooks and scripts, with the signature of TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.structure import get_base_model
from vlm_unlearn.modeling.trial import check_processor_files
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.arguments import UnlearningConfig
from vlm_unlearn.training.method_trainer import EvalFunction, MethodTrainer
from vlm_unlearn.training.reference_values import CacheKeys, OnReference
from vlm_unlearn.training.setup import build_parts, check_forget_answers, mark_trainable


class UnlearningTrainer(MethodTrainer):
    """Unlearns a forget set while it preserves a retain set.

    Resuming, gradient accumulation, distribution and logging are those of transformers.

    Example:
        >>> trainer = UnlearningTrainer(
        ...     model=model,
        ...     args=UnlearningConfig(output_dir="runs/npo", method="npo", method_args={"beta": 0.5}),
        ...     train_dataset="data/train",
        ...     processing_class=processor,
        ...     peft_config=LoraConfig(r=32, target_modules=["q_proj", "v_proj"]),
        ... )
        >>> trainer.train()
        >>> trainer.save_model("models/npo")

    Args:
        model: A model that ``AutoModelForImageTextToText`` loads, a PEFT model of it, or its folder or name on the hub.
        args: The arguments.
        train_dataset: The examples of each role: an `UnlearningDataset`, the folder of a training set, a `DatasetDict`
            with one split per role, a `Dataset` with a column ``role``, or a mapping of role to rows. See
            `UnlearningDataset.from_datasets` for the columns.
        processing_class: The model's processor, with a chat template. By default, that of the folder or name that the
            model was loaded from.
        peft_config: The adapters to train, of any kind that PEFT has. None trains the parameters of the model that
            require gradients, without the vision tower unless ``args.freeze_vision_tower`` is False.
        eval_fn: Called with the model in evaluation mode, every ``args.eval_steps`` steps if ``args.eval_strategy`` is
            ``"steps"``. Its rates are logged as ``eval_<name>``.
        callbacks: Callbacks of transformers.
        optimizers: An optimizer and a scheduler instead of the default ones.
        cache_keys: Identify model and data in the caches on disk. None caches in memory only.
        on_reference: Called while reference values are computed before the first step, with the number of finished
            examples and of all examples.
        check_lengths: Whether to check the lengths of all examples before training.

    Raises:
        UserError: An argument does not fit the model, the data or the other arguments.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: UnlearningConfig,
        train_dataset: Any,
        processing_class: Processor = None,
        peft_config: PeftConfig | None = None,
        *,
        eval_fn: EvalFunction | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        cache_keys: CacheKeys | None = None,
        on_reference: OnReference | None = None,
        check_lengths: bool = True,
    ) -> None:
        if not isinstance(args, UnlearningConfig):
            raise UserError("must be an UnlearningConfig", code="invalid-field", field="args")
        if args.eval_strategy != "no" and eval_fn is None:
            raise UserError("eval_strategy needs an eval_fn", code="missing-setting", field="eval_fn")
        if eval_fn is not None and args.eval_strategy == "no":
            raise UserError(
                'eval_fn is never called. Set eval_strategy="steps" and eval_steps.',
                code="conflicting-settings",
                field="eval_strategy",
            )
        if isinstance(model, str | Path):
            if Path(model).is_dir():
                check_processor_files(Path(model))
            model = cast(nn.Module, AutoModelForImageTextToText.from_pretrained(model))
        if processing_class is None:
            name = getattr(get_base_model(model).config, "_name_or_path", "")
            if not name:
                raise UserError("pass the model's processor", code="missing-setting", field="processing_class")
            processing_class = AutoProcessor.from_pretrained(name)
        data = UnlearningDataset.from_any(train_dataset)
        vlm = mark_trainable(VisionLanguageModel(model, processing_class), args, peft_config)
        # Adapters that were trained before are part of the reference model, which disabling them would not give.
        new_adapters = peft_config is not None or (args.reference == "adapter" and vlm.has_adapters)
        parts = build_parts(vlm, args, data, new_adapters)
        if not args.accept_refusals:
            check_forget_answers(parts.method, data, f"{args.method} would unlearn", "accept_refusals=True")
        if check_lengths:
            parts.collator.check_lengths()
        super().__init__(
            parts,
            eval_fn=eval_fn,
            callbacks=callbacks,
            optimizers=optimizers,
            cache_keys=cache_keys,
            on_reference=on_reference,
        )
