"""Recipes train for real: what must move moves, what must not stays, and references agree wherever they come from."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import families
from helpers import raises_code, recipe
from trained import RMU, RR, moved, weights
from vlm_unlearn.config import TrainableConfig
from vlm_unlearn.data.importers import import_vlguard
from vlm_unlearn.data.training_set import read_training_set, write_training_set
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.models.loader import load_model, load_run_model, run_model_folder
from vlm_unlearn.store import lock_run
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.runner import run_recipe
from vlm_unlearn.training.trainer import last_complete_checkpoint

VISION, PROJECTOR, LANGUAGE = "vision_tower", "multi_modal_projector", "language_model"
FORGETTING = ["ga", "gd", "kl", "npo", "simnpo", "po", "idk_dpo", "undial", RMU, RR]


def before_and_after(base: Path, run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All weights of the base and of what was made of it, adapters merged."""
    return load_model(base, "fp32").state_dict(), load_run_model(run_model_folder(str(run)), "fp32")[0].state_dict()


@pytest.mark.parametrize(
    ("method", "data", "weight"),
    [
        *((method, "harmful", 0.0) for method in [*FORGETTING, "dpo"]),
        *((method, "refusals", 0.0) for method in ("mixed_sft", "posthoc_sft")),
        *((method, "safe_eraser", 0.5) for method in [*FORGETTING, "mixed_sft"]),
        *(({"name": name, "paper_compat": True}, "safe_eraser", 0.5) for name in ("kl", "npo")),
    ],
)
def test_every_method_trains(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: object, data: str, weight: float
) -> None:
    wanted = recipe(tiny_model, training_sets[data], tmp_path / "run", method, prompt_decouple_weight=weight)
    result = run_recipe(wanted)
    changed = moved(weights(tiny_model), weights(result))
    assert not any(VISION in name for name in changed)
    assert any(PROJECTOR in name for name in changed)
    assert any("layers.0.mlp.down_proj" in name for name in changed)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert ("decouple" in log[0]) == (weight > 0)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["wall_seconds"] > 0
    assert (result / "method_state.safetensors").exists() == (method is RMU)
    assert not list(result.glob("*.bin"))  # no pickle in what is shipped


def test_only_the_named_parameters_train(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    trainable = TrainableConfig(layers=[1], parameters=["mlp.down_proj"], projector=False)
    result = run_recipe(
        recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", trainable=trainable.model_dump())
    )
    assert {name.split("layers.")[1] for name in moved(weights(tiny_model), weights(result))} == {
        "1.mlp.down_proj.weight"
    }


def test_an_adapter_evaluates_as_the_model_it_trained(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    training = {"max_steps": 8, "learning_rate": 1e-2}
    wanted = recipe(
        tiny_model, training_sets["safe_eraser"], tmp_path / "run", "po", trainable={"mode": "lora"}, training=training
    )
    folder = run_model_folder(str(run_recipe(wanted).parent))
    assert (folder / "adapter_model.safetensors").exists()
    merged, _ = load_run_model(folder, "fp32")
    base, _ = load_run_model(tiny_model, "fp32")
    changed = moved(base.state_dict(), merged.state_dict())
    assert any(LANGUAGE in name for name in changed)
    assert any(PROJECTOR in name for name in changed)
    assert not any(VISION in name for name in changed)


def test_lora_keeps_to_the_layers_named(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    trainable = {"mode": "lora", "layers": [1], "projector": False, "lora": {"r": 4, "lora_alpha": 8}}
    run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", trainable=trainable))
    adapters = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {name.split("layers.")[1].split(".")[0] for name in adapters} == {"1"}
    table = {row["part"]: row for row in json.loads((tmp_path / "run" / "trainable.json").read_text())}
    assert table["adapters"]["trained"] == sum(weight.numel() for weight in adapters.values())
    assert table["language model"]["trained"] == 0


def test_two_processes_do_not_share_a_run(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    with lock_run(tmp_path / "run"), pytest.raises(UserError, match="another process is at work"):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo"))


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_an_image_placeholder_in_a_text_is_refused(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, role: str
) -> None:
    whole = read_training_set(training_sets["harmful"])
    examples = {name: list(found) for name, found in whole.examples.items()}
    examples[role][1] = examples[role][1].model_copy(update={"answer": "look : <image>"})
    write_training_set(tmp_path / "data", whole.images, examples, {})
    with raises_code("placeholder-in-text", record=f'"{examples[role][1].id}"'):
        run_recipe(recipe(tiny_model, tmp_path / "data", tmp_path / "run", "npo"))
    assert not (tmp_path / "run").exists()


def test_changed_images_are_other_data(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world, tmp_path / "world"))
    vlguard = copy / "vlguard"
    import_vlguard(vlguard / "train.json", vlguard / "train", tmp_path / "data")
    wanted = recipe(tiny_model, tmp_path / "data", tmp_path / "run", "mixed_sft")
    run_recipe(wanted)
    first, *_, last = sorted((vlguard / "train").rglob("*.png"))
    one, other = first.read_bytes(), last.read_bytes()
    first.write_bytes(other)  # swapped: the same pictures, each under the other's questions
    last.write_bytes(one)
    with pytest.raises(UserError, match=r"different: data\.images"):
        run_recipe(wanted)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_projector_has_its_own_learning_rate(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    """AdamW's first step moves a weight by its learning rate."""
    training = {"max_steps": 1, "learning_rate": 1e-3, "projector_learning_rate": 1e-5, "lr_scheduler_type": "constant"}
    run_recipe(
        recipe(
            tiny_model, training_sets["harmful"], tmp_path / "run", "gd", training=training, trainable={"mode": mode}
        )
    )
    before, after = before_and_after(tiny_model, tmp_path / "run")
    moves = {
        part: max(float((after[name] - before[name]).abs().max()) for name in before if part in name)
        for part in (PROJECTOR, LANGUAGE)
    }
    assert moves[PROJECTOR] == pytest.approx(1e-5, rel=0.05)
    assert moves[LANGUAGE] > 1e-4


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_sine_projector_moves_within_one(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    """SineProject: W + sin(dW), so that no step, however long, moves a weight by more than 1; merged in what is saved."""
    training = {"max_steps": 6, "learning_rate": 5.0, "max_grad_norm": 1e9, "lr_scheduler_type": "constant"}
    trainable = {"mode": mode, "projector": "sine", "layers": [1], "lora": {"r": 1, "target_modules": ["o_proj"]}}
    if mode == "full":
        trainable |= {"layers": []}
    run_recipe(
        recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "gd", training=training, trainable=trainable)
    )
    before, after = before_and_after(tiny_model, tmp_path / "run")
    assert after.keys() == before.keys()
    moves = [float((after[name] - before[name]).abs().max()) for name in before if PROJECTOR in name]
    assert 0.5 < max(moves) <= 1.0
    assert not any(LANGUAGE in name for name in before if mode == "full" and not torch.equal(before[name], after[name]))


def test_a_finished_run_is_not_run_again(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    wanted = recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo")
    result = run_recipe(wanted)
    stamp = (result / "model.safetensors").stat().st_mtime_ns
    assert run_recipe(wanted) == result
    assert (result / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"different: recipe\.method\.beta"):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", {"name": "npo", "beta": 9.0}))


def test_divergence_stops_the_run(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    training = {"learning_rate": 1e30, "max_steps": 20, "max_grad_norm": 1e30}
    with pytest.raises(RunError, match="not finite at step"):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "mixed_sft", training=training))
    last = {**training, "learning_rate": 1e38, "max_steps": 1, "weight_decay": 1e5, "warmup_ratio": 0}
    with pytest.raises(
        RunError, match="the trained weights are not finite"
    ):  # the last update breaks what no loss sees any more
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "last", "mixed_sft", training=last))
    assert not (tmp_path / "last" / "model").exists()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("npq", {}, r'unknown method "npq"; did you mean "npo"\?'),
        ({"name": "npo", "betta": 1}, {}, r'method npo: unknown key "betta"; did you mean "beta"\?'),
        ({"name": "npo", "beta": 0}, {}, r"method npo: beta: Input should be greater than 0"),
        ({"name": "rmu", "layer": 2}, {}, r"method\.layer: 2 out of range; the model has decoder layers 0 to 1"),
        ("npo", {"trainable": {"layers": [7]}}, r"trainable\.layers: \[7\]"),
        (
            "npo",
            {"trainable": {"parameters": ["mlp.down_porj"]}},
            r'"mlp\.down_porj"; did you mean "mlp\.down_proj"',
        ),
        ("npo", {"trainable": {"layers": [], "projector": False}}, r"no parameter is trainable"),
        (
            "npo",
            {"trainable": {"mode": "lora", "lora": {"target_modules": ["q_proj", "vproj"]}}},
            r'lora\.target_modules: no decoder layer contains "vproj"; did you mean "v_proj"',
        ),
        (
            "npo",
            {"prompt_decouple_weight": 1.0},
            r"prompt decoupling needs decouple\.jsonl: import SafeEraser, or a table with decouple rows",
        ),
        ("npo", {"reference": "adapter"}, r"reference: adapter needs trainable\.mode=lora"),
        (RMU, {"reference": "cache"}, r"reference: cache holds one NLL a sample"),
        (
            "npo",
            {"trainable": {"mode": "lora", "parameters": ["mlp"]}},
            r"parameter_patterns and vision_tower require mode=full",
        ),
        ({"name": "rr", "layers": [0, 9]}, {}, r"method\.layers: 9 out of range; the model has decoder layers 0 to 1"),
        (
            "kl",
            {"reference": "cache"},
            r"reference: cache holds one NLL a sample, and this method needs logits; use reference=auto",
        ),
        ("npo", {"trainable": {"mode": "qlora"}}, r"trainable\.mode=qlora needs a CUDA GPU; use trainable\.mode=lora"),
        (
            "npo",
            {"training": {"attn_implementation": "flash_attention_2"}},
            r"flash_attention_2 needs a CUDA GPU; use sdpa",
        ),
        (
            "npo",
            {"training": {"attn_implementation": "flex_attention"}},
            r"flex_attention computes no gradients on a CPU; use sdpa",
        ),
        (
            "npo",
            {"training": {"report_to": ["trackio"]}},
            r"report_to=trackio needs the package trackio: pip install trackio",
        ),
        (
            "npo",
            {"training": {"projector_learning_rate": 1e-5}, "trainable": {"projector": False}},
            r"projector_learning_rate: the projector doesn't train; set trainable\.projector=true",
        ),
        ("npo", {"training": {"max_length": 8}}, r'example ".*": question and image take \d+ tokens, max_length is 8'),
        (RMU, {"training": {"max_length": 8}}, r'example ".*": question, image and answer take \d+ tokens'),
    ],
)
def test_wrong_requests_write_nothing(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    method: object,
    changes: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", method, **changes))
    assert not (tmp_path / "run").exists()


def test_dpo_needs_its_preferred_answers(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"dpo needs preferred\.jsonl; import VLGuard with --harmful-answers, .* or take idk_dpo"
    ):
        run_recipe(recipe(tiny_model, training_sets["safe_eraser"], tmp_path / "run", "dpo"))


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        (
            "FSDP",
            {"trainable": {"projector": "sine"}},
            r"projector=sine doesn't work with FSDP or DeepSpeed; use recipes",
        ),
        (
            "DEEPSPEED",
            {"method": RMU},
            r"needs a frozen copy of what trains, which DeepSpeed hides; use recipes/engines/fsdp2\.yaml",
        ),
        ("FSDP", {"probe": {"suite": "suites/tiny"}}, r"probe doesn't work with FSDP"),
    ],
)
def test_engines_say_what_they_cannot(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    changes: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setattr("vlm_unlearn.training.plan._need", lambda *arguments: None)
    method = changes.pop("method", "npo")
    with pytest.raises(UserError, match=message):
        plan(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", method, **changes))


def test_cross_attention_families_take_images_or_none(training_sets: dict[str, Path], tmp_path: Path) -> None:
    families.build("mllama", tmp_path / "mllama")
    whole = read_training_set(training_sets["harmful"])
    examples = {name: list(found) for name, found in whole.examples.items()}
    examples["retain"][0] = examples["retain"][0].model_copy(update={"image": None})
    write_training_set(tmp_path / "data", whole.images, examples, {})
    with pytest.raises(
        UserError, match=r'retain example ".*" has no image, others have, .* set training\.batch_size=1'
    ):
        plan(recipe(tmp_path / "mllama", tmp_path / "data", tmp_path / "run", "npo"))
    layer = min(load_model(tmp_path / "mllama", "fp32").config.text_config.cross_attention_layers)
    rmu = {"name": "rmu", "layer": layer}
    with pytest.raises(UserError, match=rf"decoder layer {layer} of this model is left out then"):
        plan(
            recipe(
                tmp_path / "mllama",
                tmp_path / "data",
                tmp_path / "run",
                rmu,
                training={"per_device_train_batch_size": 1},
            )
        )


def test_a_divergence_keeps_the_last_good_checkpoint(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """Weight decay blows the weights up from step to step, past what a float holds."""
    training = {
        "learning_rate": 1.0,
        "weight_decay": 3e5,
        "max_steps": 30,
        "save_steps": 1,
        "lr_scheduler_type": "constant",
    }
    with pytest.raises(
        RunError,
        match=r"not finite at step \d+.*; start again in a new .*; the last good checkpoint is .*checkpoint-\d+",
    ):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "mixed_sft", training=training))
    kept = last_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept is not None
    assert all(value.isfinite().all() for value in load_file(kept / "trained.safetensors").values())
    assert (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("method", ["npo", "kl", RMU], ids=["npo", "kl", "rmu"])
def test_bf16_trains_saves_and_resumes(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, mode: str, method: object
) -> None:
    """Frozen weights in bf16, what trains in float32, a sine projector between the two, references under either."""
    trainable = {"mode": mode, "projector": "sine", "lora": {"r": 4}}
    training = {"precision": "bf16", "learning_rate": 1e-2, "gradient_checkpointing": True}
    result = run_recipe(
        recipe(tiny_model, training_sets["harmful"], tmp_path / "run", method, trainable=trainable, training=training)
    )
    before, after = before_and_after(tiny_model, result.parent)
    assert all(value.isfinite().all() for value in after.values())
    assert any(PROJECTOR in name and not torch.equal(before[name], after[name]) for name in before)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    reference = {"npo": "forget", "kl": "retain_kl"}.get(str(method), "retain_hidden")
    at_reference = {"forget": 2 * math.log(2) / 0.1}.get(reference, 0.0)
    assert float(log[0][reference]) == pytest.approx(at_reference, abs=0.05)  # the first step is the reference
