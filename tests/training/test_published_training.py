"""``paper_compat: full`` trains as the released code of both papers, on the same tiny model, data and draws.

The figures of the released code are in ``tests/golden/published_training.json``. `record_published.py` next to it made
them. Draws of the released code that no seed determines are replayed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import published_model as tiny
from vlm_unlearn.config import TrainableConfig
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data_tools.importers import import_files, import_safe_eraser
from vlm_unlearn.methods import Role
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.trainable import prepare_trainable
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.records import Example
from vlm_unlearn.training.arguments import UnlearningConfig
from vlm_unlearn.training.method_trainer import MethodTrainer
from vlm_unlearn.training.published_order import (
    BatchLayout,
    SafeEraserStream,
    SafetyMirageStream,
    repeat_scheduler_steps,
)
from vlm_unlearn.training.setup import build_parts

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "published_training.json").read_text(encoding="utf-8"))
# The largest difference of the first loss and of all losses, and that of the weights as a share of their change.
FIRST_LOSS, LOSS, WEIGHTS = 1e-5, 1e-4, 1e-4
FAST = {
    *("gdpd", "klpd_batch_2", "idkpd", "gdpd_2_processes"),
    *("npo_full_batch_4_2_processes", "npo_lora", "rmu_full", "rmu_full_batch_4"),
}


def runs(system: str) -> list[Any]:
    """Returns the names of a system's runs. Those that add little are slow tests."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in GOLDEN[system]]


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_hf_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def safe_eraser_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("safe-eraser")
    tiny.write_safe_eraser(folder)
    dataset = folder / "dataset"
    import_safe_eraser(dataset / "all_train.json", folder, folder / "data", dataset / "prompt.json")
    return folder / "data"


@pytest.fixture(scope="module")
def safety_mirage_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_safety_mirage(tmp_path_factory.mktemp("safety-mirage"))
    files = {role: folder / f"{role}_data.json" for role in ("forget", "retain")}
    import_files(files, folder / "image", folder / "data")
    return folder / "data"


class Recorder(MethodTrainer):
    """Records the loss of each micro-batch and the learning rate of each step."""

    losses: list[float]
    rates: list[float]
    processes = 1  # of the released code

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss.detach()))
        return loss

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().create_scheduler(*args, **kwargs)
        repeat_scheduler_steps(self.method, scheduler, self.processes)
        return scheduler

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        self.losses, self.rates = [], []
        optimizer.register_step_pre_hook(lambda *_: self.rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer


COMMON: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "tokens_per_pass": 0,  # the golden losses are those of each micro-batch
}


def set_adapters(model: torch.nn.Module) -> None:
    """Gives adapters the initial values of the comparison."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.from_numpy(tiny.adapter_values(name, tuple(parameter.shape))))


def trained_arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {
        name: parameter.detach().numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def compare(trainer: Recorder, first: Mapping[str, np.ndarray], golden: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the largest difference of a loss, and the difference of the weights as a share of their change."""
    change = tiny.measure_change(dict(first), trained_arrays(trainer.vlm.model))
    difference = np.array(change["projections"]) - np.array(golden["projections"])
    # The projections have as many directions as there are numbers, each with the expected square of the norm.
    weights = float(np.sqrt((difference**2).mean())) / golden["norm"]
    assert len(trainer.losses) == len(golden["losses"])
    losses = float(np.abs(np.array(trainer.losses) - np.array(golden["losses"])).max())
    return losses, weights


METHODS = {
    "ga": ({"name": "ga"}, 0.0),
    "gapd": ({"name": "ga"}, 0.5),
    "gd": ({"name": "gd"}, 0.0),
    "gdpd": ({"name": "gd", "retain_weight": 0.5}, 0.5),
    "kl": ({"name": "kl"}, 0.0),
    "klpd": ({"name": "kl"}, 1.0),
    "idk": ({"name": "po"}, 0.0),
    "idkpd": ({"name": "po"}, 1.0),
}


class ReplayedSafeEraser(SafeEraserStream):
    """The stream with the draws of the released code: for each sample one of a refusal (PO) and of a retain example."""

    draws: list[list[int]]  # by process

    def _sample(self, position: int) -> tuple[int, int]:
        """Returns the process of a position, and the number of samples that it has read before."""
        layout, samples = self._layout, len(self._examples["forget"])
        row = position % layout.rows
        index = self._forget_index(position)
        assert index is not None
        steps = -(-layout.batches(samples) // layout.accumulation_steps)
        epoch = position // (steps * layout.samples_per_step)
        process, row_of_batch = divmod(row, layout.batch_size)
        index_of_process = (index - row) // layout.rows * layout.batch_size + row_of_batch
        return process, epoch * (samples // layout.processes) + index_of_process

    def retain_index(self, position: int, forget_index: int) -> int:
        process, sample = self._sample(position)
        draws_per_sample = 2 if self._method.forget_target == "refusal" else 1
        drawn = self.draws[process][draws_per_sample * (sample + 1) - 1]
        return (forget_index + drawn) % len(self._examples["retain"])

    def _with_refusal(self, forget: Example, position: int) -> Example:
        process, sample = self._sample(position)
        return forget.model_copy(update={"answer": self._refusals[self.draws[process][2 * sample]]})


def run_safe_eraser(
    name: str, hf_model: Path, data: Path, out: Path, processes: int = 1
) -> tuple[Recorder, dict[str, np.ndarray]]:
    """Trains as in the record of a name.

    One process computes the batches of several processes in turn, with as many more accumulation steps, so that it has
    the same gradients.
    """
    golden = GOLDEN["safe_eraser"][name]
    loss = name.removesuffix("_batch_2").removesuffix("_2_processes")
    batch_size, accumulation = (2, 2) if name.endswith("_batch_2") else (1, 4)
    options, weight = METHODS[loss]
    options = {**options, "paper_compat": "full"}
    trainable = TrainableConfig.model_validate({"mode": "lora", "lora": {"r": 4, "lora_alpha": 32}})
    model = load_model(hf_model, "fp32", "auto")
    vlm = prepare_trainable(VisionLanguageModel(model, load_processor(hf_model, "processor")), trainable)
    set_adapters(vlm.model)
    args = UnlearningConfig(
        output_dir=str(out),
        method=options.pop("name"),
        method_args=options,
        prompt_decouple_weight=weight,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation * processes,
        num_train_epochs=4,
        learning_rate=1e-3,
        weight_decay=0.01,
        warmup_steps=0.06,
        **COMMON,
    )
    steps = len(golden["rates"])
    training_set = UnlearningDataset.from_folder(data)
    training_set.image_loader = "llava"
    parts = build_parts(vlm, args, training_set, new_adapters=True)
    assert parts.args.max_steps == steps
    layout = BatchLayout(batch_size, accumulation, processes)
    stream = ReplayedSafeEraser(training_set, parts.method, len(parts.stream), 233, layout)
    stream.draws = golden["draws"] if processes > 1 else [golden["draws"]]
    trainer = Recorder(dataclasses.replace(parts, stream=stream))
    trainer.processes = processes
    first = trained_arrays(vlm.model)
    trainer.train()
    return trainer, first


@pytest.mark.parametrize("name", runs("safe_eraser"))
def test_safe_eraser_trains_as_the_released_code(
    name: str, hf_model: Path, safe_eraser_data: Path, tmp_path: Path
) -> None:
    golden = GOLDEN["safe_eraser"][name]
    trainer, first = run_safe_eraser(name, hf_model, safe_eraser_data, tmp_path, 2 if "processes" in name else 1)
    losses, weights = compare(trainer, first, golden)
    assert trainer.rates == pytest.approx(golden["rates"], abs=1e-12)
    assert abs(trainer.losses[0] - golden["losses"][0]) < FIRST_LOSS
    assert losses < LOSS
    assert weights < WEIGHTS


class ReplayedSafetyMirage(SafetyMirageStream):
    """The stream with the retain records and the shuffled passes of the released code."""

    orders: list[dict[str, list[list[int]]]]  # by process

    def replay(self, golden: Mapping[str, Any], processes: int) -> None:
        numbers = {example.id.rsplit("_", 1)[-1]: index for index, example in enumerate(self._examples["retain"])}
        drawn = golden["retain_ids"] if processes > 1 else [golden["retain_ids"]]
        self._retain_sets = [[numbers[record_id.rsplit("_", 1)[-1]] for record_id in ids] for ids in drawn]
        self.orders = golden["orders"] if processes > 1 else [golden["orders"]]

    def pass_order(self, role: Role, number: int, process: int) -> list[int]:
        return self.orders[process][role][number]


# name -> method, batch size, epochs
SAFETY_MIRAGE: dict[str, tuple[dict[str, Any], int, int]] = {
    "npo_full": ({"name": "npo", "beta": 0.9, "retain_npo_weight": 1.0}, 1, 1),
    "npo_full_batch_4": ({"name": "npo", "beta": 0.9, "retain_npo_weight": 1.0}, 4, 4),
    "npo_generic": ({"name": "npo", "beta": 0.1}, 1, 1),
    "npo_lora": ({"name": "npo", "beta": 0.7}, 4, 4),
    "rmu_full": ({"name": "rmu", "layer": 1}, 1, 2),
    "rmu_full_batch_4": ({"name": "rmu", "layer": 1}, 4, 4),
    "rmu_lora": ({"name": "rmu", "layer": 2, "alpha": 0.0, "retain_weight": 1.2}, 4, 4),
}
TRAINABLE = {
    "lora": {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8}},
    "npo": {"mode": "full"},
    "rmu": {"mode": "full", "layers": [0, 1], "parameter_patterns": ["mlp.down_proj"]},
}


def run_safety_mirage(
    name: str, hf_model: Path, data: Path, out: Path, processes: int = 1
) -> tuple[Recorder, dict[str, np.ndarray]]:
    """Trains as in the record of a name. Several processes are as in `run_safe_eraser`."""
    options, batch_size, epochs = SAFETY_MIRAGE[name.removesuffix("_2_processes")]
    options, golden = {**options, "paper_compat": "full"}, GOLDEN["safety_mirage"][name]
    lora = name.endswith("lora")
    trainable = TrainableConfig.model_validate(TRAINABLE["lora" if lora else options["name"]])
    model = load_model(hf_model, "fp32", "auto")
    vlm = prepare_trainable(VisionLanguageModel(model, load_processor(hf_model, "pad")), trainable)
    set_adapters(vlm.model)
    args = UnlearningConfig(
        output_dir=str(out),
        method=options.pop("name"),
        method_args=options,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=processes,
        num_train_epochs=epochs,
        learning_rate=1e-3,
        projector_learning_rate=1e-3 if lora else None,
        warmup_steps=0.03,
        **COMMON,
    )
    training_set = UnlearningDataset.from_folder(data)
    training_set.image_loader = "llava"
    parts = build_parts(vlm, args, training_set, new_adapters=lora)
    assert parts.args.max_steps == len(golden["rates"])
    stream = ReplayedSafetyMirage(
        training_set, parts.method, len(parts.stream), 0, BatchLayout(batch_size, 1, processes)
    )
    stream.replay(golden, processes)
    if "control_vector" in golden:
        parts.method.control_vector = torch.tensor(golden["control_vector"])  # type: ignore[attr-defined]
    trainer = Recorder(dataclasses.replace(parts, stream=stream))
    first = trained_arrays(vlm.model)
    trainer.train()
    return trainer, first


@pytest.mark.parametrize("name", runs("safety_mirage"))
def test_safety_mirage_trains_as_the_released_code(
    name: str, hf_model: Path, safety_mirage_data: Path, tmp_path: Path
) -> None:
    golden = GOLDEN["safety_mirage"][name]
    trainer, first = run_safety_mirage(name, hf_model, safety_mirage_data, tmp_path, 2 if "processes" in name else 1)
    losses, weights = compare(trainer, first, golden)
    assert trainer.rates == pytest.approx(golden["rates"], abs=1e-12)
    assert abs(trainer.losses[0] - golden["losses"][0]) < FIRST_LOSS
    assert losses < LOSS
    assert weights < WEIGHTS
