"""Two processes train the model that one trains: DDP, FSDP2 and, where it is installed, DeepSpeed's ZeRO-3, all over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_unlearn.models.layout import decoder_layers
from vlm_unlearn.models.loader import load_run_model, run_model_folder

STEPS = ["training.max_steps=4", "training.learning_rate=1e-3", "training.precision=fp32", "training.save_steps=100"]
RMU = ["method=rmu", "method.layer=0"]
RR = ["method=rr", "method.layers=[0]", "prompt_decouple_weight=0"]
# rr begins where its gradient is nothing, and Adam makes whole steps of rounding errors: a cross-entropy beside it
# decides the first one, where its gradient comes to, which is not every embedding.
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
        "stage3_param_persistence_threshold": 0,  # else a tiny model isn't cut up at all
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    ),
}
COMMAND = ["-m", "vlm_unlearn.cli.main"]


def train(
    processes: int, program: list[str], keys: list[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if processes > 1:
        start += [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            "0",
            "--rdzv_backend",
            "c10d",
        ]
        start += ["--rdzv_endpoint", "localhost:0"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*start, *program, "train", "tiny/npo", *keys], capture_output=True, text=True, check=False, env=variables
    )


def test_a_loss_may_end_at_an_early_layer(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    """DDP must not wait for gradients of what lies above, where rr's loss doesn't come to."""
    output = tmp_path / "two"
    keys = [
        f"model={tiny_model}",
        f"data={training_sets['safe_eraser']}",
        *STEPS,
        *RR,
        "training.per_device_train_batch_size=4",
        f"output={output}",
    ]
    done = train(2, COMMAND, keys, {})
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (load_run_model(run_model_folder(str(folder)), "fp32")[0] for folder in (tiny_model, output))
    moved = [
        max(
            float((one - other).abs().max())
            for one, other in zip(*(layer.parameters() for layer in layers), strict=True)
        )
        for layers in zip(decoder_layers(before), decoder_layers(after), strict=True)
    ]
    assert moved[0] > 1e-4
    assert not any(moved[1:])


def test_images_on_the_forget_side_alone(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    """rmu's forget pass ends early and uses the projector; were the retain pass behind it without images, DDP would take it for unused."""
    data = tmp_path / "data"
    shutil.copytree(training_sets["safe_eraser"], data)
    retain = [json.loads(line) for line in (data / "retain.jsonl").read_text().splitlines()]
    (data / "retain.jsonl").write_text("".join(json.dumps({**example, "image": None}) + "\n" for example in retain))
    keys = [f"model={tiny_model}", f"data={data}", *STEPS, *RMU, "trainable.mode=lora"]
    done = train(1, COMMAND, [*keys, "training.per_device_train_batch_size=4", f"output={tmp_path / 'one'}"], {})
    assert done.returncode == 0, done.stderr[-3000:]
    done = train(2, COMMAND, [*keys, "training.per_device_train_batch_size=2", f"output={tmp_path / 'two'}"], {})
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4


def difference(one: Path, other: Path) -> float:
    models = [load_run_model(run_model_folder(str(folder)), "fp32")[0].state_dict() for folder in (one, other)]
    assert models[0].keys() == models[1].keys()
    return max(float((models[0][name] - models[1][name]).abs().max()) for name in models[0])


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        ("ddp", ["method=npo", "trainable.vision_tower=true"]),
        ("ddp", RR_RETAIN),
        ("ddp", [*RMU, "trainable.mode=lora"]),
        ("fsdp2", RMU),
        ("fsdp2", ["method=kl", "trainable.mode=lora"]),
        ("zero3", ["method=npo"]),
    ],
    ids=["ddp-npo-vision", "ddp-rr", "ddp-rmu-lora", "fsdp2-rmu-full", "fsdp2-kl-lora", "zero3-npo"],
)
def test_two_processes_train_as_one(
    engine: str, method: list[str], tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """One process with batches of 8, two with 2 x 2 each: the same eight samples a step, with answers of unequal lengths."""
    program, environment = COMMAND, {}
    if engine == "fsdp2":
        program, environment = [str(Path(__file__).parents[1] / "fsdp_on_cpu.py")], FSDP
    elif engine == "zero3":
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("needs deepspeed (pip install '.[deepspeed]')")
        config = tmp_path / "zero3.json"
        config.write_text(json.dumps(ZERO3))
        environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
        environment["VLM_UNLEARN_CACHE"] = str(
            tmp_path / "cache"
        )  # so that the reference values are computed under ZeRO-3 too
    keys = [
        f"model={tiny_model}",
        f"data={training_sets['safe_eraser']}",
        "prompt_decouple_weight=0.5",
        *STEPS,
        *method,
    ]
    done = train(1, COMMAND, [*keys, "training.per_device_train_batch_size=8", f"output={tmp_path / 'one'}"], {})
    assert done.returncode == 0, done.stderr
    parts = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
    done = train(2, program, [*keys, *parts, f"output={tmp_path / 'two'}"], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["identity"]["processes"] == 2
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4
    assert difference(tiny_model, tmp_path / "two") > 1e-4
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for one, two in zip(*logs, strict=True):
        assert two == {key: pytest.approx(value, abs=1e-4) for key, value in one.items()}
