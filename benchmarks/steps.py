"""The models, batches and training steps of the speed benchmarks."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from published_steps import LAYER, NEEDS_REFERENCE, PUBLISHED
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_unlearn.config import MethodConfig, TrainableConfig
from vlm_unlearn.methods import Method, build_method
from vlm_unlearn.modeling.features import FeatureCache, cache_vision_features
from vlm_unlearn.modeling.forward import forward
from vlm_unlearn.modeling.fused_layers import fused_layers
from vlm_unlearn.modeling.lora_forward import fast_lora
from vlm_unlearn.modeling.packing import packing_of
from vlm_unlearn.modeling.trainable import prepare_trainable, without_lora_input_casts
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.arguments import UNLIMITED
from vlm_unlearn.training.passes import Passes
from vlm_unlearn.training.references import NLL, AdapterReference, CachedReference, Reference
from vlm_unlearn.training.step import ModelStep

IMAGE_TOKEN, PATCH, VOCABULARY = 5, 14, 32_000
ROWS = 4  # questions of a role in a step
Batch = dict[str, torch.Tensor]
Batches = dict[str, Batch]


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    vision_width: int
    vision_layers: int
    intermediate: int | None = None  # of the language model; None: 2.7 times the width


SIZES = {
    "15M": Size(width=256, layers=8, vision_width=256, vision_layers=4),
    "53M": Size(width=512, layers=8, vision_width=512, vision_layers=6),
    "160M": Size(width=768, layers=12, vision_width=768, vision_layers=12),
}
METHODS: dict[str, tuple[dict[str, Any], float]] = {  # options and the weight of prompt decoupling
    "npo": ({"name": "npo", "beta": 0.9, "retain_npo_weight": 1.0, "paper_compat": True}, 0.0),
    "rmu": ({"name": "rmu", "layer": LAYER}, 0.0),
    "mixed_sft": ({"name": "mixed_sft"}, 0.0),
    "ga": ({"name": "ga"}, 0.0),
    "gd": ({"name": "gd"}, 0.0),
    "kl": ({"name": "kl"}, 0.0),
    "po": ({"name": "po"}, 0.0),
    "ga+pd": ({"name": "ga"}, 0.5),
    "gd+pd": ({"name": "gd", "retain_weight": 0.5}, 0.5),
    "kl+pd": ({"name": "kl"}, 1.0),
    "po+pd": ({"name": "po"}, 1.0),
    "simnpo": ({"name": "simnpo"}, 0.0),
    "dpo": ({"name": "dpo"}, 0.0),
    "undial": ({"name": "undial"}, 0.0),
    "rr": ({"name": "rr", "layers": [LAYER]}, 0.0),
}
LORA = TrainableConfig.model_validate({"mode": "lora", "projector": True, "lora": {"r": 16}})


def build(size: Size, image_tokens: int) -> Any:
    """Returns a LLaVA with random weights and `image_tokens` tokens per image, on torch's default device."""
    torch.manual_seed(0)
    side = PATCH * round(image_tokens**0.5)
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_width // 64,
        image_size=side,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.intermediate or int(2.7 * size.width),
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=image_tokens
    )
    return LlavaForConditionalGeneration(config)


def make_batch(seed: int, images: int, questions: int, image_tokens: int) -> Batch:
    """Returns samples: 35 tokens of system prompt, an image, a question of 12 to 24 tokens, an answer of 40 to 60."""
    random = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=random))
        return torch.randint(10, VOCABULARY, (length,), generator=random).tolist()

    side = PATCH * round(image_tokens**0.5)
    system, rows, labels, keys, pixels = list(range(10, 45)), [], [], [], []
    for number in range(images):
        picture = torch.randn(3, side, side, generator=random)
        for _ in range(questions):
            prompt = [*system, *[IMAGE_TOKEN] * image_tokens, *text(12, 24)]
            answer = text(40, 60)
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
            keys.append(1000 * seed + number)
            pixels.append(picture)
    padded = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": padded(rows, batch_first=True),
        "attention_mask": padded([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": padded(labels, batch_first=True, padding_value=-100),
        "pixel_values": torch.stack(pixels),
        "images": torch.tensor(keys),
    }


def make_batches(seed: int, questions: int, image_tokens: int, rows: int = ROWS) -> Batches:
    """Returns the batches of a step, with `rows` questions of each role, more if an image has more questions.

    With several questions per image, as in SafeEraser's data, forget and retain questions are on the same images.
    With one question per image, as in VLGuard's data, they are on different ones. Decouple questions are on further
    images.
    """
    images = max(1, rows // questions)
    roles = ("forget", "retain", "preferred", "decouple")
    batches = {
        role: make_batch(10 * seed + number, images, questions, image_tokens) for number, role in enumerate(roles)
    }
    for role in ("preferred", "retain") if questions > 1 else ("preferred",):
        batches[role] |= {name: batches["forget"][name] for name in ("pixel_values", "images")}
    return batches


def moved(batches: Batches, device: torch.device, dtype: torch.dtype) -> Batches:
    """Returns the batches on a device, with floating-point tensors in the model's dtype."""
    return {
        role: {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in batch.items()
        }
        for role, batch in batches.items()
    }


def build_prepared_method(name: str, model: Any) -> Method:
    """Returns the method, prepared for the model."""
    options, weight = METHODS[name]
    method = build_method(MethodConfig.model_validate(options), weight)
    text = model.config.text_config
    method.prepare(text.hidden_size, text.num_hidden_layers, torch.Generator().manual_seed(0))
    return method


class Ours:
    """Runs steps like the trainer, and computes reference values like a run before its first step.

    Args:
        base: The model, which is modified.
        name: The method.
        steps: The batches of all steps. Keys of reference values are added to them.
        trainable: The trainable parameters.
    """

    def __init__(self, base: Any, name: str, steps: list[Batches], trainable: TrainableConfig = LORA) -> None:
        self.method = build_prepared_method(name, base)
        self.vlm = prepare_trainable(VisionLanguageModel(base), trainable)
        self.model = self.vlm.model
        cache_vision_features(self.vlm.vision_tower, FeatureCache(2**31))
        self.optimizer = optimizer(self.model)
        self.reference: Reference = AdapterReference()
        started = time.perf_counter()
        if self.method.requirements.references and name in ("npo", "dpo"):
            values: dict[Any, dict[int, NLL]] = {need.role: {} for need in self.method.requirements.references}
            for number, batches in enumerate(steps):
                for role in self.method.requirements.roles:
                    batch = batches[role]
                    rows = len(batch["input_ids"])
                    batch["answer_keys"] = torch.arange(number * rows, (number + 1) * rows)
                    if role in values:
                        with torch.no_grad():
                            output = forward(self.vlm, batch, packing=packing_of(self.vlm, batch))
                        columns = (column.tolist() for column in output.answer_nll)
                        values[role].update(zip(batch["answer_keys"].tolist(), zip(*columns, strict=True), strict=True))
            self.reference = CachedReference(values)
        self.preparation_seconds = time.perf_counter() - started

    def step(self, batches: Batches) -> float:
        roles: Any = {role: batches[role] for role in self.method.requirements.roles}
        if self.method.append_answer_to_prompt:
            roles["forget"] = {name: value for name, value in roles["forget"].items() if name != "labels"}
        autocast = torch.is_autocast_enabled(self.model.device.type)
        with (
            fast_lora(self.model),
            fused_layers(self.vlm.decoder_layers),
            without_lora_input_casts(self.model) if autocast else nullcontext(),
        ):
            passes = Passes(self.vlm, [roles], self.method, self.reference, max_tokens=UNLIMITED)
            loss = self.method.loss(ModelStep(passes)).total
            return update(self.optimizer, loss)


class Published:
    """Runs steps of the published structure, with a second model as the reference."""

    def __init__(self, base: Any, name: str, trainable: TrainableConfig = LORA) -> None:
        self.reference = copy.deepcopy(base).eval() if name in NEEDS_REFERENCE else None
        self.control = build_prepared_method(name, base).state().get("control_vector")
        self.model = prepare_trainable(VisionLanguageModel(base), trainable).model
        self.optimizer = optimizer(self.model)
        self.loss = PUBLISHED[name]

    def step(self, batches: Batches) -> float:
        if self.control is not None:
            batches = {
                **batches,
                "forget": {**batches["forget"], "control": self.control.to(batches["forget"]["pixel_values"].device)},
            }
        return update(self.optimizer, self.loss(self.model, self.reference, batches))


def optimizer(model: Any) -> torch.optim.Optimizer:
    """Returns the Trainer's default optimizer: AdamW, fused on a GPU."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
