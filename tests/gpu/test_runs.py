"""Training runs and generation on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

import families
from helpers import recipe
from vlm_unlearn.data.encoding import Turn
from vlm_unlearn.generation.decoding import SeededSampling
from vlm_unlearn.generation.hf import generate_texts
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.training.checkpoints import last_complete_checkpoint
from vlm_unlearn.training.runner import run_recipe

pytestmark = pytest.mark.gpu

LORA = {"mode": "lora", "lora": {"r": 4, "lora_dropout": 0.1}}  # dropout: the random state of the device is resumed too


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_run_resumes_to_the_same_weights(
    precision: str, device: torch.device, tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    training = {"max_steps": 6, "save_steps": 2, "precision": precision}

    def interrupt(step: int, steps: int, terms: object) -> None:
        if step == 5:
            raise KeyboardInterrupt

    def start(name: str, on_step: object = None) -> bytes:
        configured = recipe(
            tiny_model, training_sets["harmful"], tmp_path / name, "npo", trainable=LORA, training=training
        )
        return (run_recipe(configured, on_step) / "adapter_model.safetensors").read_bytes()  # type: ignore[arg-type]

    uninterrupted = start("uninterrupted")
    with pytest.raises(KeyboardInterrupt):
        start("interrupted", interrupt)
    checkpoint = last_complete_checkpoint(tmp_path / "interrupted" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    assert start("interrupted") == uninterrupted


def test_training_with_cached_features_gives_the_same_losses(
    device: torch.device, tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    logs = []
    for cache in ("memory", "off"):
        training = {"feature_cache": cache, "precision": "bf16"}
        configured = recipe(
            tiny_model, training_sets["harmful"], tmp_path / cache, "npo", trainable=LORA, training=training
        )
        losses: list[float] = []
        run_recipe(configured, lambda step, steps, terms, losses=losses: losses.append(terms["loss"]))  # type: ignore[misc]
        logs.append(losses)
    assert logs[0] == pytest.approx(logs[1], rel=1e-2)


def test_training_and_generation_run_no_cudnn_attention(
    cuda: torch.device, tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    configured = recipe(
        tiny_model, training_sets["harmful"], tmp_path / "run", "npo", trainable=LORA, training={"precision": "bf16"}
    )
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run_recipe(configured)
        model = load_model(tiny_model, "bf16").to(cuda).eval()  # type: ignore[arg-type]
        generate_texts(model, load_processor(tiny_model), [Turn("t", None, "what is this ?", None)], 4)
    names = {event.key for event in profiler.key_averages()}
    assert any("scaled_dot_product" in name for name in names)
    assert not [name for name in names if "cudnn_attention" in name]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_answers_with_shared_prefixes_equal_those_alone_and_on_the_cpu(
    family: str, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = families.shared_folder(family, tmp_path_factory)
    image = tmp_path_factory.mktemp("images") / "image.png"
    Image.new("RGB", (64, 48), (90, 120, 30)).save(image)
    turns = [
        Turn(f"t{number}", image, question, None)
        for number, question in enumerate(("What is this ?", "Who is there , and why ?", "Why ?"))
    ]
    processor = load_processor(folder)
    model = load_model(folder, "fp32").eval()
    on_cpu = generate_texts(model, processor, turns, 40)
    model.to(device)  # type: ignore[arg-type]
    assert generate_texts(model, processor, turns, 40) == on_cpu
    assert [generate_texts(model, processor, [turn], 40)[0] for turn in turns] == on_cpu

    def sample(chosen: Sequence[int]) -> list[tuple[str, str]]:
        sampler = SeededSampling([100 + number for number in chosen], 2.0, 0.9, model.device)
        return generate_texts(model, processor, [turns[number] for number in chosen], 40, sampler)

    together = sample(range(3))
    assert together == sample(range(3))
    assert together == [sample([number])[0] for number in range(3)]
    assert generate_texts(model, processor, turns, 40, batch_size=2) == on_cpu
