"""Recipes train for real: what must move moves, what must not stays, and references agree wherever they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import recipe
from vlm_unlearn.config import TrainableConfig
from vlm_unlearn.data.importing import import_vlguard
from vlm_unlearn.data.training_set import read_training_set, write_training_set
from vlm_unlearn.errors import RequestError, WorkError
from vlm_unlearn.models.loading import load_run_model, run_model_folder
from vlm_unlearn.store import lock_run
from vlm_unlearn.training.runner import run_recipe

VISION, PROJECTOR, LANGUAGE = "vision_tower", "multi_modal_projector", "language_model"
RMU = {"name": "rmu", "layer": 0}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("method", "data", "weight"),
    [("npo", "harmful", 0.0), (RMU, "harmful", 0.0), ("mixed_sft", "refusals", 0.0), ("po", "safe_eraser", 0.0)]
    + [(method, "safe_eraser", 0.5) for method in ("npo", RMU, "po", "mixed_sft")],
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
    result = run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", trainable=trainable.model_dump()))
    assert {name.split("layers.")[1] for name in moved(weights(tiny_model), weights(result))} == {"1.mlp.down_proj.weight"}


def test_weight_zero_is_the_bare_method_to_the_bit(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    bare = run_recipe(recipe(tiny_model, training_sets["safe_eraser"], tmp_path / "bare", "npo"))
    zero = run_recipe(recipe(tiny_model, training_sets["safe_eraser"], tmp_path / "zero", "npo", prompt_decouple_weight=0.0))
    assert not moved(weights(bare), weights(zero))


@pytest.mark.parametrize("method", [{"name": "npo", "beta": 0.5, "retain_npo_weight": 1.0}, {"name": "npo", "paper": True}])
def test_references_agree_wherever_they_come_from(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: dict[str, object]
) -> None:
    lora = {"mode": "lora", "lora": {"r": 4, "alpha": 8}}
    logs = {}
    for source, trainable in (("cache", {}), ("copy", {}), ("cache+lora", lora), ("adapter+lora", lora)):
        output = tmp_path / source
        run_recipe(recipe(tiny_model, training_sets["harmful"], output, method, trainable=trainable, reference=source.split("+")[0]))
        logs[source] = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for one, other in (("cache", "copy"), ("cache+lora", "adapter+lora")):
        for a, b in zip(logs[one], logs[other], strict=True):
            assert float(a["forget"]) == pytest.approx(float(b["forget"]), abs=1e-5)


def test_rmu_under_lora_and_full_see_the_same_reference(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    first = {}
    for name, trainable in (("full", {}), ("lora", {"mode": "lora"})):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / name, RMU, trainable=trainable))
        first[name] = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
    # Before the first update the model is the reference.
    assert float(first["full"]["retain_hidden"]) == pytest.approx(0.0, abs=1e-9)
    assert float(first["lora"]["retain_hidden"]) == pytest.approx(0.0, abs=1e-9)
    assert float(first["full"]["forget"]) == pytest.approx(float(first["lora"]["forget"]), abs=1e-5)


def test_an_adapter_evaluates_as_the_model_it_trained(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    training = {"max_steps": 8, "learning_rate": 1e-2}
    wanted = recipe(tiny_model, training_sets["safe_eraser"], tmp_path / "run", "po", trainable={"mode": "lora"}, training=training)
    folder = run_model_folder(str(run_recipe(wanted).parent))
    assert (folder / "adapter_model.safetensors").exists()
    merged, _ = load_run_model(folder, "fp32")
    base, _ = load_run_model(tiny_model, "fp32")
    changed = moved(base.state_dict(), merged.state_dict())
    assert any(LANGUAGE in name for name in changed)
    assert any(PROJECTOR in name for name in changed)
    assert not any(VISION in name for name in changed)


def test_lora_keeps_to_the_layers_named(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    trainable = {"mode": "lora", "layers": [1], "projector": False, "lora": {"r": 4, "alpha": 8}}
    run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", trainable=trainable))
    adapters = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {name.split("layers.")[1].split(".")[0] for name in adapters} == {"1"}
    table = {row["part"]: row for row in json.loads((tmp_path / "run" / "trainable.json").read_text())}
    assert table["adapters"]["trained"] == sum(weight.numel() for weight in adapters.values())
    assert table["language model"]["trained"] == 0


def test_two_processes_do_not_share_a_run(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    with lock_run(tmp_path / "run"), pytest.raises(RequestError, match="another process is at work"):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo"))


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_an_image_placeholder_in_a_text_is_refused(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, role: str) -> None:
    whole = read_training_set(training_sets["harmful"])
    examples = {name: list(found) for name, found in whole.examples.items()}
    examples[role][1] = examples[role][1].model_copy(update={"answer": "look : <image>"})
    write_training_set(tmp_path / "data", whole.images, examples, {})
    with pytest.raises(RequestError, match=f'"{examples[role][1].id}": the text holds the image placeholder <image>'):
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
    with pytest.raises(RequestError, match=r"different: data\.images"):
        run_recipe(wanted)


def test_accumulation_means_what_it_says(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    """4 x 1 gives an RMU step of the same size as 1 x 4: a mean loss must not be scaled twice (4 times the gradient)."""
    norms = []
    for name, batch, accumulation in (("whole", 4, 1), ("parts", 1, 4)):
        training = {"max_steps": 1, "batch_size": batch, "gradient_accumulation_steps": accumulation}
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / name, RMU, training=training))
        norms.append(float(json.loads((tmp_path / name / "log.jsonl").read_text())["grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_a_finished_run_is_not_run_again(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    wanted = recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo")
    result = run_recipe(wanted)
    stamp = (result / "model.safetensors").stat().st_mtime_ns
    assert run_recipe(wanted) == result
    assert (result / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(RequestError, match=r"different: recipe\.method\.beta"):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", {"name": "npo", "beta": 9.0}))


def test_divergence_stops_the_run(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    training = {"learning_rate": 1e30, "max_steps": 20, "max_grad_norm": 1e30}
    with pytest.raises(WorkError, match="not finite at step"):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "mixed_sft", training=training))
    last = {**training, "learning_rate": 1e38, "max_steps": 1, "weight_decay": 1e5}
    with pytest.raises(WorkError, match="the trained weights are not finite"):  # the last update breaks what no loss sees any more
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "last", "mixed_sft", training=last))
    assert not (tmp_path / "last" / "model").exists()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("npq", {}, r'unknown method "npq"; did you mean "npo"\?'),
        ({"name": "npo", "betta": 1}, {}, r'method npo: unknown key "betta"; did you mean "beta"\?'),
        ({"name": "npo", "beta": 0}, {}, r"method npo: beta: Input should be greater than 0"),
        ({"name": "rmu", "layer": 2}, {}, r"method\.layer: 2 out of range; the model has decoder layers 0 to 1"),
        ("npo", {"trainable": {"layers": [7]}}, r"trainable\.layers: \[7\] out of range"),
        ("npo", {"trainable": {"parameters": ["nothing"], "projector": False}}, r"nothing would train"),
        ("npo", {"prompt_decouple_weight": 1.0}, r"prompt decoupling needs decouple\.jsonl"),
        ("npo", {"reference": "adapter"}, r"reference: adapter needs trainable\.mode=lora"),
        (RMU, {"reference": "cache"}, r"reference: cache holds one NLL a sample"),
        ("npo", {"trainable": {"mode": "lora", "parameters": ["mlp"]}}, r"parameters and vision_tower are for mode=full"),
        ("npo", {"training": {"max_length": 8}}, r'example ".*": question and image take \d+ tokens, max_length is 8'),
        (RMU, {"training": {"max_length": 8}}, r'example ".*": question, image and answer take \d+ tokens'),
    ],
)
def test_wrong_requests_write_nothing(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: object, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", method, **changes))
    assert not (tmp_path / "run").exists()
