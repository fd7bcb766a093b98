"""Recipes that do not fit their data, their model or this machine are rejected before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

import families
from helpers import raises_code, recipe
from trained import RMU
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.training_set import write_training_set
from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.loader import load_model
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.runner import run_recipe


@pytest.mark.parametrize(
    ("method", "changes", "code", "field", "tokens"),
    [
        ("npq", {}, "unknown-name", "method", ['"npq"', 'did you mean "npo"']),
        ({"name": "rmu", "layer": 2}, {}, "out-of-range", "method.layer", ["2", "0 to 1"]),
        ({"name": "rr", "layers": [0, 9]}, {}, "out-of-range", "method.layers", ["9", "0 to 1"]),
        ("npo", {"prompt_decouple_weight": 1.0}, "missing-pairs", None, ["the role decouple"]),
        ("npo", {"reference": "adapter"}, "conflicting-settings", "reference", ["trainable.mode=lora"]),
        (RMU, {"reference": "cache"}, "conflicting-settings", "reference", ["hidden states", "reference=auto"]),
        ("kl", {"reference": "cache"}, "conflicting-settings", "reference", ["logits", "reference=auto"]),
        ("npo", {"trainable": {"mode": "qlora"}}, "missing-gpu", "trainable.mode", ["trainable.mode=lora"]),
        (
            "npo",
            {"training": {"attn_implementation": "flash_attention_2"}},
            "missing-gpu",
            "training.attn_implementation",
            ["flash_attention_2", "sdpa"],
        ),
        (
            "npo",
            {"training": {"attn_implementation": "flex_attention"}},
            "missing-gpu",
            "training.attn_implementation",
            ["flex_attention", "sdpa"],
        ),
        (
            "npo",
            {"training": {"report_to": ["trackio"]}},
            "missing-package",
            "training.report_to",
            ["pip install trackio"],
        ),
        (
            "npo",
            {"training": {"projector_learning_rate": 1e-5}, "trainable": {"projector": False}},
            "conflicting-settings",
            "training.projector_learning_rate",
            ["trainable.projector=true"],
        ),
        ("npo", {"training": {"max_length": 8}}, "question-too-long", None, ["training.max_length"]),
        (RMU, {"training": {"max_length": 8}}, "question-too-long", None, ["answer", "training.max_length"]),
    ],
)
def test_invalid_recipe_is_rejected_before_anything_is_written(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    method: object,
    changes: dict[str, object],
    code: str,
    field: str | None,
    tokens: list[str],
) -> None:
    with raises_code(code, field=field) as caught:
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", method, **changes))
    assert all(token in str(caught.value) for token in tokens), str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "changes", "tokens"),
    [
        ({"name": "npo", "betta": 1}, {}, ["betta", 'did you mean "beta"']),
        ({"name": "npo", "beta": 0}, {}, ["method npo", "beta"]),
        ("npo", {"trainable": {"layers": [7]}}, ["trainable.layers", "7"]),
        (
            "npo",
            {"trainable": {"parameter_patterns": ["mlp.down_porj"]}},
            ['"mlp.down_porj"', 'did you mean "mlp.down_proj"'],
        ),
        ("npo", {"trainable": {"layers": [], "projector": False}}, ["trainable"]),
        (
            "npo",
            {"trainable": {"mode": "lora", "lora": {"target_modules": ["q_proj", "vproj"]}}},
            ["lora.target_modules", '"vproj"', 'did you mean "v_proj"'],
        ),
        (
            "npo",
            {"trainable": {"mode": "lora", "parameter_patterns": ["mlp"]}},
            ["trainable", "trainable.lora.target_modules"],
        ),
    ],
)
def test_invalid_method_option_or_trainable_setting_is_rejected_before_anything_is_written(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    method: object,
    changes: dict[str, object],
    tokens: list[str],
) -> None:
    with pytest.raises(UserError) as caught:
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", method, **changes))
    assert all(token in str(caught.value) for token in tokens), str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["npo", "ga", RMU, "idk_dpo"])
def test_unlearning_refusals_is_rejected_unless_accepted(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: object
) -> None:
    unlearning = recipe(tiny_model, training_sets["refusals"], tmp_path / "run", method)
    with raises_code("forget-refusals", file=training_sets["refusals"]) as caught:
        plan(unlearning)
    assert "accept_refusals=true" in str(caught.value)
    assert not (tmp_path / "run").exists()
    accepting = recipe(tiny_model, training_sets["refusals"], tmp_path / "run", method, accept_refusals=True)
    assert "accept_refusals" not in plan(accepting).identity["recipe"]  # type: ignore[operator]


@pytest.mark.parametrize("method", ["mixed_sft", "po"])
def test_methods_that_train_refusals_accept_refusals(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: str
) -> None:
    plan(recipe(tiny_model, training_sets["refusals"], tmp_path / "run", method))


def test_dpo_without_preferred_answers_is_rejected(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    with raises_code("missing-pairs", file=training_sets["safe_eraser"]) as caught:
        run_recipe(recipe(tiny_model, training_sets["safe_eraser"], tmp_path / "run", "dpo"))
    for token in ("the role preferred", "--harmful-answers", "idk_dpo"):
        assert token in str(caught.value)


def test_dpo_with_unpaired_or_different_preferred_examples_is_rejected(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    training_set = UnlearningDataset.from_folder(training_sets["harmful"])
    examples = {name: list(of_role) for name, of_role in training_set.items()}
    forget = examples["forget"][0]
    preferred = next(example for example in examples["preferred"] if example.pair_id == forget.pair_id)
    changed = {
        "unpaired": preferred.model_copy(update={"pair_id": "none"}),
        "different": preferred.model_copy(update={"question": "what else ?"}),
    }
    for name, example in changed.items():
        others = [record for record in examples["preferred"] if record.id != preferred.id]
        write_training_set(tmp_path / name, training_set.image_roots, {**examples, "preferred": [*others, example]}, {})
    with raises_code("missing-pairs", file=tmp_path / "unpaired", record=forget.id, field="pair_id"):
        plan(recipe(tiny_model, tmp_path / "unpaired", tmp_path / "run", "dpo"))
    with raises_code("pair-mismatch", file=tmp_path / "different", record=preferred.id):
        plan(recipe(tiny_model, tmp_path / "different", tmp_path / "run", "dpo"))


@pytest.mark.parametrize(
    ("engine", "method", "changes", "field", "alternative"),
    [
        ("FSDP", "npo", {"trainable": {"projector": "sine"}}, "trainable.projector", "recipes/engines/ddp.yaml"),
        ("DEEPSPEED", RMU, {}, "reference", "recipes/engines/fsdp2.yaml"),
        ("FSDP", "npo", {"probe": {"suite": "suites/tiny"}}, "probe", "recipes/engines/ddp.yaml"),
    ],
)
def test_setting_that_an_engine_does_not_support_is_rejected(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    method: object,
    changes: dict[str, object],
    field: str,
    alternative: str,
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setattr("vlm_unlearn.training.plan._require_package", lambda *arguments: None)
    with raises_code("unsupported-setting", field=field) as caught:
        plan(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", method, **changes))
    assert alternative in str(caught.value)


def test_cross_attention_family_with_some_images_missing_is_rejected(
    training_sets: dict[str, Path], tmp_path: Path
) -> None:
    families.build("mllama", tmp_path / "mllama")
    training_set = UnlearningDataset.from_folder(training_sets["harmful"])
    examples = {name: list(of_role) for name, of_role in training_set.items()}
    examples["retain"][0] = examples["retain"][0].model_copy(update={"image": None})
    write_training_set(tmp_path / "data", training_set.image_roots, examples, {})
    with raises_code("unsupported-setting", record=examples["retain"][0].id, field="image") as caught:
        plan(recipe(tmp_path / "mllama", tmp_path / "data", tmp_path / "run", "npo"))
    assert "training.per_device_train_batch_size=1" in str(caught.value)
    layer = min(load_model(tmp_path / "mllama", "fp32").config.text_config.cross_attention_layers)
    single = {"per_device_train_batch_size": 1}
    for method, field in (({"name": "rmu", "layer": layer}, "layer"), ({"name": "rr", "layers": [layer]}, "layers")):
        with raises_code("conflicting-settings", field=f"method.{field}") as caught:
            plan(recipe(tmp_path / "mllama", tmp_path / "data", tmp_path / "run", method, training=single))
        assert f"decoder layer {layer}" in str(caught.value)


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_example_with_an_image_placeholder_in_its_text_is_trained_on_as_text(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, role: str
) -> None:
    training_set = UnlearningDataset.from_folder(training_sets["harmful"])
    examples = {name: list(of_role) for name, of_role in training_set.items()}
    examples[role][1] = examples[role][1].model_copy(update={"answer": "look : <image>"})
    write_training_set(tmp_path / "data", training_set.image_roots, examples, {})
    run_recipe(recipe(tiny_model, tmp_path / "data", tmp_path / "run", "npo"))
    assert (tmp_path / "run" / "manifest.json").exists()
