"""The DPO step of this package compared with TRL's DPOTrainer: seconds per step and losses.

    pip install -c constraints.txt trl==1.16.0
    OMP_NUM_THREADS=1 python -W ignore benchmarks/trl_dpo.py [--full] [--retain]

Both sides get the same model and the same batches, and run their steps in turn in one process with one thread, so that
noise of the machine affects both. The ratio is the median over the steps of the last epoch, when the vision features
are cached. TRL computes the reference model in every step of a vision-language model. This package computes it before
the first step. With ``--retain``, our steps train on as many retain samples in addition, which TRL's do not.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from steps import IMAGE_TOKEN, METHODS, SIZES, Batches, Ours, build, make_batches, optimizer, update

from vlm_unlearn.config import TrainableConfig
from vlm_unlearn.losses import dpo_loss
from vlm_unlearn.methods.base import ForwardRequirements, LossOutput, Step, register
from vlm_unlearn.methods.dpo import DPO
from vlm_unlearn.modeling.trainable import prepare_trainable
from vlm_unlearn.modeling.vlm import VisionLanguageModel

IMAGE_TOKENS = 144  # without the separator of a prompt
SETTINGS = {
    "lora": {"mode": "lora", "lora": {"r": 16}},
    "full": {"mode": "full"},
}


def build_processor() -> Any:
    """Returns a processor that TRL's constructor accepts. The batches are encoded already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "word": 4, "<image>": IMAGE_TOKEN}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    return LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=14, image_token="<image>")


@register("dpo_alone", "Rafailov et al. 2023, arXiv 2305.18290")
class DPOAlone(DPO):
    """DPO without the retain term, as TRL has it."""

    @property
    def requirements(self) -> ForwardRequirements:
        """Returns the requirements of DPO without those of the retain role."""
        return replace(super().requirements, roles=("forget", "preferred"))

    def loss(self, step: Step) -> LossOutput:
        """Returns the preference term."""
        current = [step.nll(role, "sum") for role in ("preferred", "forget")]
        reference = [step.reference_nll(role, "sum") for role in ("preferred", "forget")]
        loss = dpo_loss(*current, *reference, self.options.beta)
        return LossOutput(loss, {"forget": loss})


class TRL:
    """Runs steps of TRL's DPOTrainer, with the adapters disabled or a second model as the reference."""

    def __init__(self, base: Any, trainable: TrainableConfig) -> None:
        from datasets import Dataset
        from PIL import Image
        from trl import DPOConfig, DPOTrainer

        reference = copy.deepcopy(base).eval() if trainable.mode == "full" else None
        model = prepare_trainable(VisionLanguageModel(base), trainable).model
        row = {"prompt": "word", "chosen": "word", "rejected": "word", "images": [Image.new("RGB", (14, 14))]}
        arguments = DPOConfig(
            output_dir=tempfile.mkdtemp(),
            beta=0.1,
            max_length=None,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        self.trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=arguments,
            train_dataset=Dataset.from_list([row]),
            processing_class=build_processor(),
        )
        self.model = self.trainer.model
        self.model.train()
        self.optimizer = optimizer(self.model)

    def step(self, batches: Batches) -> float:
        return update(self.optimizer, self.trainer.compute_loss(self.model, _joined(batches)))


def _joined(batches: Batches) -> dict[str, torch.Tensor]:
    """Returns the batch as TRL's collator does: the chosen answers, then the rejected ones."""
    rows, masks, pixels = [], [], []
    for role in ("preferred", "forget"):
        batch = batches[role]
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
            rows.append(ids[mask])
            masks.append((labels[mask] != -100).long())
        pixels.append(batch["pixel_values"])
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "completion_mask": pad(masks, batch_first=True),
        "pixel_values": torch.cat(pixels),
    }


def compare(mode: str, size: str, questions: int, steps: int, retain: bool) -> None:
    """Prints the median ratio of the step times and the largest difference of the losses."""
    trainable = TrainableConfig.model_validate(SETTINGS[mode])
    batches = [make_batches(number, questions, IMAGE_TOKENS) for number in range(steps)]
    METHODS["dpo"] = ({"name": "dpo" if retain else "dpo_alone", "beta": 0.1}, 0.0)
    ours = Ours(build(SIZES[size], IMAGE_TOKENS), "dpo", batches, trainable)
    trl = TRL(build(SIZES[size], IMAGE_TOKENS), trainable)
    ratios, differences = [], []
    for step in batches * 2:
        started = time.perf_counter()
        loss = ours.step(step)
        between = time.perf_counter()
        differences.append(abs(loss - trl.step(step)))
        ratios.append((time.perf_counter() - between) / (between - started))
    warm = sorted(ratios[steps:])
    agreement = "" if retain else f", and losses differ by at most {max(differences):.0e}"
    print(
        f"{mode}{' with retain samples' if retain else ''}, {size}, {questions} questions an image: TRL takes "
        f"{statistics.median(warm):.1f} times our step ({warm[0]:.1f} to {warm[-1]:.1f}){agreement}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="train all parameters instead of adapters")
    parser.add_argument("--retain", action="store_true", help="also train on retain samples in our steps")
    parser.add_argument("--size", choices=SIZES, default="15M")
    parser.add_argument("--questions", type=int, default=4, help="questions per image")
    parser.add_argument("--steps", type=int, default=4, help="steps per epoch. There are two epochs")
    options = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        sys.exit("This benchmark needs TRL: pip install trl==1.16.0")
    torch.set_num_threads(1)
    compare("full" if options.full else "lora", options.size, options.questions, options.steps, options.retain)


if __name__ == "__main__":
    main()
