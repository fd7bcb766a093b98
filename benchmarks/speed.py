"""A training step here against the published structure: samples a second, peak memory and losses, for every method.

    python benchmarks/speed.py            every size, half an hour on two cores
    python benchmarks/speed.py --quick    the smallest size, under four minutes

Builds LLaVA models of random weights, gives both sides the same batches, and takes their steps in turn, so that a noisy machine
is noisy for both. Writes benchmarks/results/latest.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from published_steps import NEEDS_REFERENCE, gd_pd, kl, npo, rmu
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_unlearn.config import MethodConfig, TrainableConfig
from vlm_unlearn.methods import Method, build_method
from vlm_unlearn.models.features import FeatureCache, keep_features
from vlm_unlearn.models.layout import vision_tower
from vlm_unlearn.models.trainable import prepare_trainable
from vlm_unlearn.store import package_versions, peak_memory_mb
from vlm_unlearn.training.forward import forward
from vlm_unlearn.training.references import AdapterReference
from vlm_unlearn.training.step import ModelStep

RESULTS = Path(__file__).parent / "results"
IMAGE_TOKEN, PATCH, VOCABULARY = 5, 14, 32_000
LAYER = 3  # that rmu steers


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    vision_width: int
    vision_layers: int


SIZES = {
    "15M": Size(width=256, layers=8, vision_width=256, vision_layers=4),
    "53M": Size(width=512, layers=8, vision_width=512, vision_layers=6),
    "160M": Size(width=768, layers=12, vision_width=768, vision_layers=12),
}
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "npo": ({"name": "npo", "beta": 0.9, "retain_npo_weight": 1.0, "paper": True}, 0.0),
    "gd+pd": ({"name": "gd", "retain_weight": 0.5}, 0.5),
    "kl": ({"name": "kl"}, 0.0),
    "rmu": ({"name": "rmu", "layer": LAYER}, 0.0),
}
Batches = dict[str, dict[str, torch.Tensor]]


def build(size: Size, image_tokens: int) -> Any:
    """A LLaVA of random weights whose images take `image_tokens` tokens."""
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
        intermediate_size=int(2.7 * size.width),
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        max_position_embeddings=2048,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=image_tokens)
    return LlavaForConditionalGeneration(config)


def make_batch(seed: int, images: int, questions: int, image_tokens: int) -> dict[str, torch.Tensor]:
    """Questions of 12 to 24 tokens with answers of 40 to 60 behind a system line of 35 and an image."""
    random = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(10, VOCABULARY, (length,), generator=random).tolist()

    side = PATCH * round(image_tokens**0.5)
    system, rows, labels, keys, pixels = list(range(10, 45)), [], [], [], []
    for number in range(images):
        picture = torch.randn(3, side, side, generator=torch.Generator().manual_seed(1000 * seed + number))
        for _ in range(questions):
            question = text(int(torch.randint(12, 25, (1,), generator=random)))
            answer = text(int(torch.randint(40, 61, (1,), generator=random)))
            before = [*system, *[IMAGE_TOKEN] * image_tokens, *question]
            rows.append(before + answer)
            labels.append([-100] * len(before) + answer)
            keys.append(1000 * seed + number)
            pixels.append(picture)
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
        "pixel_values": torch.stack(pixels),
        "images": torch.tensor(keys),
    }


def make_batches(seed: int, questions: int, image_tokens: int) -> Batches:
    """Forget and retain questions on one image, decouple questions on another."""
    forget = make_batch(2 * seed, 1, questions, image_tokens)
    retain = make_batch(2 * seed + 10**6, 1, questions, image_tokens)
    retain |= {name: forget[name] for name in ("pixel_values", "images")}
    return {"forget": forget, "retain": retain, "decouple": make_batch(2 * seed + 1, 1, questions, image_tokens)}


class Ours:
    """A step as the trainer takes it, with what a run caches before its first step."""

    def __init__(self, base: Any, name: str, steps: list[Batches]) -> None:
        options, weight = METHODS[name]
        self.method: Method = build_method(MethodConfig.model_validate(options), weight)
        self.model = prepare_trainable(base, LORA)
        keep_features(vision_tower(self.model), FeatureCache(2**31))
        self.method.prepare(base.config.text_config.hidden_size, 8, torch.Generator().manual_seed(0))
        self.optimizer = optimizer(self.model)
        started = time.perf_counter()
        for batches in steps if name == "npo" else ():
            for role in ("forget", "retain"):
                with torch.no_grad():
                    nll, tokens = forward(self.model, batches[role], pack=True).answer
                batches[role] |= {"reference_nll_sum": nll, "reference_tokens": tokens}
        self.before = time.perf_counter() - started

    def step(self, batches: Batches) -> float:
        roles = {role: batches[role] for role in self.method.roles}
        if self.method.forget_as_one_turn:
            roles["forget"] = {name: value for name, value in roles["forget"].items() if name != "labels"}
        loss = self.method.loss(ModelStep(self.model, roles, self.method, AdapterReference())).total
        return update(self.optimizer, loss)


class Published:
    """A step of the published structure; where it has a reference, a second model."""

    def __init__(self, base: Any, name: str) -> None:
        self.reference = copy.deepcopy(base).eval() if name in NEEDS_REFERENCE else None
        self.model = prepare_trainable(base, LORA)
        self.optimizer = optimizer(self.model)
        steers = build_method(MethodConfig.model_validate(METHODS["rmu"][0]), 0.0)
        steers.prepare(base.config.text_config.hidden_size, 8, torch.Generator().manual_seed(0))
        control = steers.state()["control_vector"]
        self.loss = {"npo": npo, "gd+pd": gd_pd, "kl": kl, "rmu": partial(rmu, layer=LAYER, control=control)}[name]

    def step(self, batches: Batches) -> float:
        return update(self.optimizer, self.loss(self.model, self.reference, batches))


LORA = TrainableConfig.model_validate({"mode": "lora", "projector": True, "lora": {"r": 16}})


def optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def compare(name: str, size: str, questions: int, image_tokens: int, steps: int) -> dict[str, Any]:
    """Both sides take the same steps in turn, from the same weights."""
    published = [make_batches(number, questions, image_tokens) for number in range(steps)]
    ours = [{role: dict(batch) for role, batch in batches.items()} for batches in published]
    torch.manual_seed(1)
    here = Ours(build(SIZES[size], image_tokens), name, ours)
    torch.manual_seed(1)
    there = Published(build(SIZES[size], image_tokens), name)
    times: dict[str, list[float]] = {"ours": [], "published": []}
    losses: list[tuple[float, float]] = []
    for number in range(steps):
        pair = []
        for side, step, batches in (("ours", here.step, ours[number]), ("published", there.step, published[number])):
            started = time.perf_counter()
            pair.append(step(batches))
            times[side].append(time.perf_counter() - started)
        losses.append((pair[0], pair[1]))
    medians = {side: statistics.median(found[1:]) for side, found in times.items()}  # the first step warms up
    roles = here.method.roles
    tokens = int(sum(published[0][role]["attention_mask"].sum() for role in roles))
    ratios = [slow / fast for slow, fast in zip(times["published"][1:], times["ours"][1:], strict=True)]
    return {
        "method": name,
        "size": size,
        "parameters": sum(parameter.numel() for parameter in there.model.parameters()),
        "questions_per_image": questions,
        "image_tokens": image_tokens,
        "steps": steps,
        "seconds": medians["ours"],
        "published_seconds": medians["published"],
        "samples_per_second": len(roles) * questions / medians["ours"],
        "tokens_per_second": tokens / medians["ours"],
        "speedup": medians["published"] / medians["ours"],
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
        "max_loss_difference": max(abs(a - b) for a, b in losses),
        "loss_first": losses[0][0],
        "loss_last": losses[-1][0],
        "seconds_before": here.before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="npo")
    parser.add_argument("--size", default="15M")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--image-tokens", type=int, default=144)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(json.dumps(compare(arguments.method, arguments.size, arguments.questions, arguments.image_tokens, arguments.steps), indent=1))


if __name__ == "__main__":
    main()
