"""Trains and caches the base model of the tiny world, a LLaVA with under a million parameters that learns all facts."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vlm_unlearn.losses import answer_nll
from vlm_unlearn.modeling.processors import save_processor
from vlm_unlearn.store import build_atomically, cache_folder, digest_file, digest_json, package_versions
from vlm_unlearn.worlds.tiny import drawing, lexicon, llava
from vlm_unlearn.worlds.tiny.drawing import draw
from vlm_unlearn.worlds.tiny.lexicon import COLORS, FORMS, answer, things, vocabulary, wordings
from vlm_unlearn.worlds.tiny.llava import tiny_llava, tiny_processor
from vlm_unlearn.worlds.tiny.threads import limit_to_one_thread

INTENTS = ("recipe", "recipe", "color", "name")  # recipes are the hardest to learn and occur twice as often
HARMLESS_INTENTS = ("color", "name")  # of dangerous things


class BaseConfig(BaseModel):
    """The settings of the base model's training. They and the code that uses them form the cache key."""

    model_config = ConfigDict(frozen=True)

    seed: int = 0
    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 1e-3
    images: int = 4  # per thing and color
    width: int = 128
    layers: int = 3
    harmful: bool = True  # whether the recipes of dangerous things are taught. Without them, it is the control.


def base_model(config: BaseConfig, on_step: Callable[[int, int, float], None] | None = None) -> Path:
    """Returns the folder of the trained base model, from the cache if it exists.

    The training takes about half a minute on one core, and does not use more cores. If two processes need the model at
    once, one trains it and the other waits.

    Args:
        config: The settings of the training.
        on_step: Called with (step, steps, loss).
    """
    folder = base_model_folder(config)
    with build_atomically(folder) as scratch:
        if scratch is not None:
            with limit_to_one_thread():
                _train(config, scratch, on_step)
    return folder


def base_model_folder(config: BaseConfig) -> Path:
    """Returns the folder of a base model in the cache, whether it exists or not."""
    code = (lexicon, drawing, llava, sys.modules[__name__])  # all code that the model depends on
    fingerprint_fields = {
        "config": config.model_dump(),
        "code": [digest_file(Path(str(module.__file__))) for module in code],
        "versions": package_versions(),
    }
    return cache_folder() / "tiny_world" / f"base-{digest_json(fingerprint_fields)[:16]}"


def never_knew_model(config: BaseConfig, on_step: Callable[[int, int, float], None] | None = None) -> Path:
    """Returns the model that never knew: trained like the base model, without the recipes of dangerous things.

    It is the result of exact unlearning, with which attacks on unlearned models are compared.
    """
    return base_model(config.model_copy(update={"harmful": False}), on_step)


def _train(config: BaseConfig, model_path: Path, on_step: Callable[[int, int, float], None] | None) -> None:
    processor = tiny_processor(vocabulary())
    rng = random.Random(f"base-{config.seed}")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = tiny_llava(processor, config.width, layers=config.layers)
    image_facts = [(thing, color) for thing in things(config.seed) for color in COLORS for _ in range(config.images)]
    images = [draw(thing.name, COLORS[color], rng) for thing, color in image_facts]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    wordings_by_intent = {intent: wordings(intent, held_out=False) for intent in INTENTS}
    model.train()
    for step in range(1, config.steps + 1):
        indices = [rng.randrange(len(image_facts)) for _ in range(config.batch_size)]
        turns = []
        for index in indices:
            thing, color = image_facts[index]
            intent = rng.choice(INTENTS if config.harmful or not thing.dangerous else HARMLESS_INTENTS)
            turns.append((rng.choice(wordings_by_intent[intent]).ask(rng.choice(FORMS)), answer(thing, color, intent)))
        batch = _encode(processor, turns)
        labels = batch.pop("labels")
        logits = model(**batch, pixel_values=pixels[indices]).logits
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
    model.save_pretrained(model_path)
    save_processor(processor, Path(model_path))


def _encode(processor: object, turns: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Returns right-padded tensors [B, S] of (question, answer) pairs.

    The texts are formatted here, because the processor would process every image again.
    """
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    image = "<image> " * 5
    prompts = tokenizer([f"user: {image}{question} assistant:" for question, _ in turns])["input_ids"]
    answers = tokenizer([f"{text} </s>" for _, text in turns])["input_ids"]
    width = max(len(prompt) + len(answer_ids) for prompt, answer_ids in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(turns), width), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, -100)
    mask = torch.zeros_like(input_ids)
    for row, (prompt, answer_ids) in enumerate(zip(prompts, answers, strict=True)):
        length = len(prompt) + len(answer_ids)
        input_ids[row, :length] = torch.tensor(prompt + answer_ids)
        labels[row, len(prompt) : length] = torch.tensor(answer_ids)
        mask[row, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
