"""Every value of the published recipes is that of the released script, flag by flag.

The values are those of OPTML-Group/VLM-Safety-Unlearn at 1f89239 (``scripts/v1_5/finetune_unlearn*.sh``, and the
defaults of ``llava/train/train_unlearn*.py`` for flags that a script does not pass) and of yuu250/SafeEraser at 9e96612
(``config/forget_lora.yaml``, ``config/accelerate_config.yaml`` and the constants of ``forget.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlm_unlearn.config import Recipe, load

ABSENT = object()  # of a flag that a script does not pass

# flag -> recipe key
KEYS = {
    "num_train_epochs": "training.num_train_epochs",
    "per_device_train_batch_size": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "learning_rate": "training.learning_rate",
    "mm_projector_lr": "training.projector_learning_rate",
    "weight_decay": "training.weight_decay",
    "warmup_ratio": "training.warmup_ratio",
    "lr_scheduler_type": "training.lr_scheduler_type",
    "model_max_length": "training.max_length",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "dataloader_num_workers": "training.dataloader_num_workers",
    "max_grad_norm": "training.max_grad_norm",
    "seed": "training.seed",
    "image_aspect_ratio": "image_aspect_ratio",
    "lora_r": "trainable.lora.r",
    "lora_alpha": "trainable.lora.lora_alpha",
    "lora_dropout": "trainable.lora.lora_dropout",
    "rmu_layer_id": "method.layer",
    "rmu_layer_ids": "trainable.layers",
    "rmu_steering_coeffs": "method.steering_coefficient",
    "rmu_retain_alpha": "method.alpha",
    "rmu_llava_loss_weight": "method.retain_weight",
    "npo_beta": "method.beta",
    "npo_forget_alpha": "method.forget_weight",
    "npo_llava_loss_weight": "method.retain_weight",
    "npo_retain_alpha": "method.retain_npo_weight",
}

# The defaults of flags that a script does not pass: of the released TrainingArguments and of transformers 4.37.
DEFAULTS = {
    "max_grad_norm": 1.0,
    "seed": 42,
    "mm_projector_lr": None,
    "lora_dropout": 0.05,
    "npo_retain_alpha": 0.0,
}
COMMON = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "model_max_length": 2048,
    "gradient_checkpointing": "auto",  # the scripts set True, which changes memory and time only
    "dataloader_num_workers": 4,
    "image_aspect_ratio": "pad",
    "max_grad_norm": ABSENT,
    "seed": ABSENT,
}
GENERIC_FULL = {**COMMON, "num_train_epochs": 10, "learning_rate": 10e-7, "mm_projector_lr": ABSENT}
GENERIC_LORA = {
    **COMMON,
    "num_train_epochs": 10,
    "per_device_train_batch_size": 8,
    "learning_rate": 1.1e-5,
    "mm_projector_lr": 1.1e-5,
    "lora_r": 128,
    "lora_alpha": 256,
    "lora_dropout": ABSENT,
}
NPO = {"npo_forget_alpha": 1.0, "npo_llava_loss_weight": 1.0}
# recipe -> (script, flags)
SAFETY_MIRAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "npo_full": (
        "finetune_unlearn_npo.sh",
        {
            **COMMON,
            **NPO,
            "num_train_epochs": 1,
            "learning_rate": 5e-7,
            "mm_projector_lr": ABSENT,
            "npo_beta": 0.9,
            "npo_retain_alpha": 1.0,
        },
    ),
    "npo_full_generic": (
        "finetune_unlearn.sh",
        {**GENERIC_FULL, **NPO, "npo_beta": 0.1, "npo_retain_alpha": ABSENT},
    ),
    "rmu_full": (
        "finetune_unlearn.sh",
        {
            **GENERIC_FULL,
            "rmu_layer_id": 7,
            "rmu_layer_ids": [5, 6, 7],
            "rmu_steering_coeffs": 10,
            "rmu_llava_loss_weight": 1.0,
            "rmu_retain_alpha": 1.0,
        },
    ),
    "npo_lora": (
        "finetune_unlearn_lora.sh",
        {**GENERIC_LORA, **NPO, "npo_beta": 0.7, "npo_retain_alpha": ABSENT},
    ),
    "rmu_lora": (
        "finetune_unlearn_lora.sh",
        {
            **GENERIC_LORA,
            "rmu_layer_id": 15,
            "rmu_steering_coeffs": 10,
            "rmu_llava_loss_weight": 1.2,
            "rmu_retain_alpha": 0,
        },
    ),
}


def value_at(recipe: dict[str, Any], key: str) -> object:
    value: Any = recipe
    for name in key.split("."):
        value = value[name]
    return value


def dump(name: str) -> dict[str, Any]:
    return load(Recipe, Path(name), ["data=d", "output=o"]).model_dump()


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("name", SAFETY_MIRAGE)
def test_recipe_of_safety_mirage_has_every_value_of_its_script(name: str, size: str) -> None:
    _, flags = SAFETY_MIRAGE[name]
    recipe = dump(f"safety_mirage/{name}_{size}")
    expected = {flag: DEFAULTS[flag] if value is ABSENT else value for flag, value in flags.items()}
    assert {flag: value_at(recipe, KEYS[flag]) for flag in flags} == expected
    options = {KEYS[flag] for flag in flags if KEYS[flag].startswith("method.")}
    assert {f"method.{option}" for option in recipe["method"]} - options == {"method.name", "method.paper_compat"}
    lora = "lora" in name
    assert recipe["trainable"]["mode"] == ("lora" if lora else "full")
    assert (recipe["trainable"]["projector"], recipe["trainable"]["vision_tower"]) == (True, False)
    # Parameter 6 of a decoder layer is mlp.down_proj. NPO trains the entire language model.
    assert recipe["trainable"]["parameter_patterns"] == (["mlp.down_proj"] if name == "rmu_full" else None)
    assert recipe["image_loader"] == "llava"  # PIL's convert("RGB"), without the EXIF orientation


# loss type -> method and its options, weight of the decouple term
SAFE_ERASER: dict[str, tuple[dict[str, Any], float]] = {
    "ga": ({"name": "ga", "forget_weight": 1.0}, 0.0),
    "ga_pd": ({"name": "ga", "forget_weight": 1.0}, 0.5),
    "gd": ({"name": "gd", "forget_weight": 1.0, "retain_weight": 1.0}, 0.0),
    "gd_pd": ({"name": "gd", "forget_weight": 1.0, "retain_weight": 0.5}, 0.5),
    "kl": ({"name": "kl", "forget_weight": 1.0, "kl_weight": 1.0}, 0.0),
    "kl_pd": ({"name": "kl", "forget_weight": 1.0, "kl_weight": 1.0}, 1.0),
    "po": ({"name": "po"}, 0.0),
    "po_pd": ({"name": "po"}, 1.0),
    "sine_po_pd": ({"name": "po"}, 1.0),
}
FORGET_LORA = {
    "trainable.mode": "lora",
    "trainable.lora.r": 32,
    "trainable.lora.lora_alpha": 256,
    "trainable.lora.lora_dropout": 0.05,
    "trainable.lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "trainable.vision_tower": False,
    "training.learning_rate": 1e-4,
    "training.projector_learning_rate": None,
    "training.per_device_train_batch_size": 1,
    "training.gradient_accumulation_steps": 16,
    "training.num_train_epochs": 10,
    "training.max_grad_norm": 1.0,
    "training.weight_decay": 0.01,
    "training.seed": 233,
    "training.dataloader_num_workers": 4,
    "training.gradient_checkpointing": "auto",  # the code has none, which changes memory and time only
    "training.lr_scheduler_type": "cosine",
    "training.warmup_ratio": 0.06,
    "image_aspect_ratio": "processor",  # CLIP's crop
    "image_loader": "llava",  # PIL's convert("RGB"), without the EXIF orientation
}


RUNS = [(name, model) for name in SAFE_ERASER for model in ("7b", "13b", "llama_3.2")]
RUNS.remove(("sine_po_pd", "llama_3.2"))  # SineProject was published for LLaVA only


@pytest.mark.parametrize(("name", "model"), RUNS)
def test_recipe_of_safe_eraser_has_every_value_of_its_configuration(name: str, model: str) -> None:
    recipe = dump(f"safe_eraser/{name}_{model}")
    method, weight = SAFE_ERASER[name]
    assert recipe["method"] == {**method, "paper_compat": True}
    assert recipe["prompt_decouple_weight"] == weight
    assert {key: value_at(recipe, key) for key in FORGET_LORA} == FORGET_LORA
    assert recipe["trainable"]["projector"] == ("sine" if name == "sine_po_pd" else True)
    # The published 512 counts LLaVA's 576 image tokens as one.
    assert recipe["training"]["max_length"] == (512 if model == "llama_3.2" else 512 - 1 + 576)
