"""Two processes train the same model as one process, with DDP, FSDP2 and, if installed, DeepSpeed ZeRO-3, over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fork_server import start_processes
from trained import max_difference
from vlm_unlearn.config import Recipe, load
from vlm_unlearn.modeling.loader import load_run_model, run_model_folder
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.runner import run_recipe

STEPS = ["training.max_steps=4", "training.learning_rate=1e-3", "training.precision=fp32", "training.save_steps=100"]
RMU = ["method=rmu", "method.layer=0"]
RR = ["method=rr", "method.layers=[0]", "prompt_decouple_weight=0"]
# The gradient of rr is zero at first, and Adam turns rounding errors into full-size steps. A cross-entropy
# determines the first step instead, for all parameters that it has a gradient for. These do not include all
# embeddings.
RR_RETAIN = [*RR, "method.retain_weight=1", "trainable.layers=[0,1]", "trainable.projector=true"]
FSDP = {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,CLIPEncoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # otherwise a tiny model is not sharded
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    ),
}

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(600)]


def train_in_one_process(keys: list[str]) -> None:
    run_recipe(load(Recipe, Path("tiny/npo"), keys))


def train_in_two_processes(keys: list[str], program: Path | None = None, **environment: str) -> None:
    processes = start_processes(2, ["train", "tiny/npo", *keys], program, **environment)
    for process in processes:
        _, err = process.communicate()
        assert process.wait() == 0, err[-3000:]


def train_under_torchrun(keys: list[str]) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "localhost:0", "-m", "vlm_unlearn.cli.main"]
    done = subprocess.run(
        [sys.executable, *launcher, "train", "tiny/npo", *keys],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a model folder or a run, with merged adapters."""
    weights: dict[str, torch.Tensor] = load_run_model(run_model_folder(str(folder)), "fp32")[0].state_dict()
    return weights


def test_ddp_with_a_loss_on_an_early_layer_trains_only_up_to_this_layer(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """DDP must not wait for gradients of the layers above, which rr's loss does not use."""
    output = tmp_path / "two"
    keys = [f"model={tiny_model}", f"data={training_sets['safe_eraser']}", *STEPS, *RR]
    train_in_two_processes([*keys, "training.per_device_train_batch_size=4", f"output={output}"])
    base, trained = (load_run_model(run_model_folder(str(folder)), "fp32")[0] for folder in (tiny_model, output))
    changes = [
        max_difference(dict(layer.named_parameters()), dict(trained_layer.named_parameters()))
        for layer, trained_layer in zip(
            VisionLanguageModel(base).decoder_layers, VisionLanguageModel(trained).decoder_layers, strict=True
        )
    ]
    assert changes[0] > 1e-4
    assert not any(changes[1:])


def test_ddp_with_images_in_truncated_passes_only_trains_the_same_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """rmu's forget pass stops early but uses the projector. DDP must not see a last pass without images."""
    data = tmp_path / "data"
    shutil.copytree(training_sets["safe_eraser"], data)
    retain = [json.loads(line) for line in (data / "retain.jsonl").read_text().splitlines()]
    (data / "retain.jsonl").write_text("".join(json.dumps({**example, "image": None}) + "\n" for example in retain))
    keys = [f"model={tiny_model}", f"data={data}", *STEPS, *RMU, "trainable.mode=lora"]
    train_in_one_process([*keys, "training.per_device_train_batch_size=4", f"output={tmp_path / 'one'}"])
    train_in_two_processes([*keys, "training.per_device_train_batch_size=2", f"output={tmp_path / 'two'}"])
    assert max_difference(state(tmp_path / "one"), state(tmp_path / "two")) < 1e-4


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        ("torchrun", ["method=npo", "trainable.vision_tower=true"]),
        ("ddp", RR_RETAIN),
        ("ddp", [*RMU, "trainable.mode=lora"]),
        ("ddp", ["method=npo", "defense=[{name: lat, layers: [0], epsilon: 0.5, steps: 2}, {name: sam, rho: 0.05}]"]),
        ("ddp", ["method=npo", "defense=[{name: rs, sigma: 0.01}, {name: swa, start_step: 2, interval: 1}]"]),
        ("fsdp2", RMU),
        ("fsdp2", ["method=kl", "trainable.mode=lora"]),
        ("zero3", ["method=npo"]),
    ],
    ids=[
        "torchrun-npo-vision",
        "ddp-rr",
        "ddp-rmu-lora",
        "ddp-lat-sam",
        "ddp-rs-swa",
        "fsdp2-rmu-full",
        "fsdp2-kl-lora",
        "zero3-npo",
    ],
)
def test_two_processes_train_the_weights_of_one(
    engine: str, method: list[str], tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """A step has 8 samples with answers of different lengths: one batch of 8, or 2 processes x 2 micro-batches x 2."""
    program, environment = None, {}
    if engine == "fsdp2":
        program, environment = Path(__file__).parents[1] / "fsdp_on_cpu.py", FSDP
    elif engine == "zero3":
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("needs deepspeed (pip install '.[deepspeed]')")
        config = tmp_path / "zero3.json"
        config.write_text(json.dumps(ZERO3))
        environment = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config),
            "VLM_UNLEARN_CACHE": str(tmp_path / "cache"),  # empty, so that ZeRO-3 computes the reference values
        }
    data = training_sets["safe_eraser"]
    keys = [f"model={tiny_model}", f"data={data}", "prompt_decouple_weight=0.5", *STEPS, *method]
    train_in_one_process([*keys, "training.per_device_train_batch_size=8", f"output={tmp_path / 'one'}"])
    split = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
    if engine == "torchrun":
        train_under_torchrun([*keys, *split, f"output={tmp_path / 'two'}"])
    else:
        train_in_two_processes([*keys, *split, f"output={tmp_path / 'two'}"], program, **environment)
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["identity"]["processes"] == 2
    assert max_difference(state(tmp_path / "one"), state(tmp_path / "two")) < 1e-4
    assert max_difference(state(tiny_model), state(tmp_path / "two")) > 1e-4
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for single, distributed in zip(*logs, strict=True):
        assert distributed == {key: pytest.approx(value, abs=1e-4) for key, value in single.items()}
