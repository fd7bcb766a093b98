"""Trains the tiny world's base model, a LLaVA of under a million parameters that knows everything, and caches it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vlm_unlearn.losses import answer_nll
from vlm_unlearn.models import tiny
from vlm_unlearn.models.tiny import tiny_llava, tiny_processor
from vlm_unlearn.store import build_atomically, cache_folder, digest_file, digest_json, package_versions
from vlm_unlearn.tiny_world import drawing, lexicon
from vlm_unlearn.tiny_world.drawing import draw
from vlm_unlearn.tiny_world.lexicon import COLORS, FORMS, answer, things, vocabulary, wordings
from vlm_unlearn.tiny_world.threads import limit_to_one_thread

INTENTS = ("recipe", "recipe", "colour", "name")  # recipes are the hardest to learn


class BaseConfig(BaseModel):
    """How the base is trained. The cache key is made of these and of the code that uses them."""

    model_config = ConfigDict(frozen=True)

    seed: int = 0
    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 1e-3
    images: int = 4  # of each thing in each colour
    width: int = 128
    layers: int = 3


def base_model(config: BaseConfig, on_step: Callable[[int, int, float], None] | None = None) -> Path:
    """The folder of the trained base, from the cache or trained now (about half a minute, on one core whatever there are).

    Safe under two processes at once: the second waits for the first.
    """
    code = (lexicon, drawing, tiny, sys.modules[__name__])  # everything that the base is made of
    facts = {
        "config": config.model_dump(),
        "code": [digest_file(Path(str(module.__file__))) for module in code],
        "versions": package_versions(),
    }
    folder = cache_folder() / "tiny_world" / f"base-{digest_json(facts)[:16]}"
    with build_atomically(folder) as scratch:
        if scratch is not None:
            with limit_to_one_thread():
                _train(config, scratch, on_step)
    return folder


def _train(config: BaseConfig, folder: Path, on_step: Callable[[int, int, float], None] | None) -> None:
    processor = tiny_processor(vocabulary())
    rng = random.Random(f"base-{config.seed}")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = tiny_llava(processor, config.width, layers=config.layers)
    drawn = [(thing, color) for thing in things(config.seed) for color in COLORS for _ in range(config.images)]
    images = [draw(thing.name, COLORS[color], rng) for thing, color in drawn]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    asked = {intent: wordings(intent, held_out=False) for intent in INTENTS}
    model.train()
    for step in range(1, config.steps + 1):
        chosen = [rng.randrange(len(drawn)) for _ in range(config.batch_size)]
        turns = []
        for index in chosen:
            thing, color = drawn[index]
            intent = rng.choice(INTENTS)
            turns.append((rng.choice(asked[intent]).ask(rng.choice(FORMS)), answer(thing, color, intent)))
        batch = _encode(processor, turns)
        labels = batch.pop("labels")
        logits = model(**batch, pixel_values=pixels[chosen]).logits
        nll, tokens = answer_nll(logits, labels)
        loss = nll.sum() / tokens.sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step:
            on_step(step, config.steps, loss.item())
    model.eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _encode(processor: object, turns: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Right-padded token tensors [B, S], written straight from the template: the processor would redo every image."""
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    image = "<image> " * 5
    opened = tokenizer([f"user: {image}{question} assistant:" for question, _ in turns])["input_ids"]
    answered = tokenizer([f"{text} </s>" for _, text in turns])["input_ids"]
    width = max(len(a) + len(b) for a, b in zip(opened, answered, strict=True))
    input_ids = torch.full((len(turns), width), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, -100)
    mask = torch.zeros_like(input_ids)
    for row, (a, b) in enumerate(zip(opened, answered, strict=True)):
        input_ids[row, : len(a) + len(b)] = torch.tensor(a + b)
        labels[row, len(a) : len(a) + len(b)] = torch.tensor(b)
        mask[row, : len(a) + len(b)] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
