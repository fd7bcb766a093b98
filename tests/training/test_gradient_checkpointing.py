"""``gradient_checkpointing: auto``: the choice, its record, and the repeated step if memory is not enough."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import HfArgumentParser, TrainerCallback

from fork_server import start_processes
from helpers import raises_code, recipe, run_in_process
from trained import StepScene
from vlm_unlearn.config import Recipe
from vlm_unlearn.errors import RunError
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.store import RunDirectory
from vlm_unlearn.training import gradient_checkpointing
from vlm_unlearn.training.arguments import UnlearningConfig
from vlm_unlearn.training.estimate import GIB, largest_pass
from vlm_unlearn.training.gradient_checkpointing import CheckpointingChoice, choose_checkpointing
from vlm_unlearn.training.method_trainer import MethodTrainer
from vlm_unlearn.training.passes import group_micro_batches, micro_batch_size, tokens_per_pass
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.preview import preview
from vlm_unlearn.training.runner import run_plan, run_recipe
from vlm_unlearn.training.trainer import UnlearningTrainer

LAYERS = r"model\.language_model\.layers\.\d+\..*\.(q_proj|v_proj)"
LORA = {"mode": "lora", "lora": {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}}


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without free memory, apart from that of the model."""
    monkeypatch.setattr(gradient_checkpointing, "free_memory", lambda device: 0)


def configured(model: Path, data: Path, output: Path, setting: object, **training: object) -> Recipe:
    training = {"max_steps": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": setting, **training}
    return recipe(model, data, output, {"name": "gd"}, training=training, trainable=LORA)


def weights(model: Path) -> bytes:
    return (model / "adapter_model.safetensors").read_bytes()


def trainer(model: Path, data: Path, output: Path, setting: object, **options: Any) -> UnlearningTrainer:
    changes = options.pop("arguments", {})
    arguments = UnlearningConfig(
        output_dir=str(output),
        method="gd",
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_checkpointing=setting,
        use_cpu=True,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{"tokens_per_pass": 0, "gradient_accumulation_steps": 3, **changes},
    )
    torch.manual_seed(0)
    return UnlearningTrainer(
        model=load_model(model, "fp32"),
        args=arguments,
        train_dataset=data,
        processing_class=load_processor(model),
        peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=LAYERS, init_lora_weights=False),
        **options,
    )


def trained_weights(trained: MethodTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trained.unwrapped.named_parameters() if value.requires_grad}


def assert_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def checkpoints_layers(trained: MethodTrainer) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in trained.unwrapped.modules())


# The choice


def test_checkpointing_is_off_where_memory_is_enough(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    data, choices = training_sets["harmful"], list[CheckpointingChoice]()
    automatic = run_plan(plan(configured(tiny_model, data, tmp_path / "auto", "auto")), on_checkpointing=choices.append)
    assert [choice.enabled for choice in choices] == [False]
    assert str(choices[0]).startswith("gradient checkpointing: off (without it, ")
    record = RunDirectory(tmp_path / "auto").read_manifest()["gradient_checkpointing"]
    assert record == {"enabled": False, "reason": choices[0].reason}
    assert weights(automatic) == weights(run_recipe(configured(tiny_model, data, tmp_path / "off", False)))


@pytest.mark.usefixtures("no_memory")
def test_checkpointing_is_on_where_memory_is_short(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    data = training_sets["harmful"]
    automatic = run_recipe(configured(tiny_model, data, tmp_path / "auto", "auto"))
    assert RunDirectory(tmp_path / "auto").read_manifest()["gradient_checkpointing"]["enabled"] is True
    assert weights(automatic) == weights(run_recipe(configured(tiny_model, data, tmp_path / "on", True)))


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda")])
def test_a_part_of_the_memory_stays_free(device: torch.device) -> None:
    assert choose_checkpointing(8 * GIB, 8.5 * GIB, device).enabled
    assert not choose_checkpointing(8 * GIB, 12 * GIB, device).enabled
    assert "8.0 GiB, and 12.0 GiB" in choose_checkpointing(8 * GIB, 12 * GIB, device).reason


def test_plan_prints_the_choice_for_this_machine(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"model={tiny_model}", f"data={training_sets['harmful']}", f"output={tmp_path / 'run'}"]
    command = ["train", "tiny/npo", *keys, "training.gradient_checkpointing=auto", "--plan"]
    result = json.loads(run_in_process(*command, "--json").stdout)
    assert result["gradient_checkpointing"]["enabled"] is False
    assert "main memory" in result["gradient_checkpointing"]["reason"]
    assert result["memory_with_checkpointing"] is True
    monkeypatch.setattr("vlm_unlearn.training.preview.free_memory", lambda device: 0)
    assert "gradient checkpointing: on (" in run_in_process(*command).stdout
    setting = configured(tiny_model, training_sets["harmful"], tmp_path / "run", True)
    assert preview(setting).gradient_checkpointing == CheckpointingChoice(True, "set in the recipe")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_all_processes_choose_what_the_one_with_the_least_memory_needs(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "from vlm_unlearn.cli.main import main\n"
        "from vlm_unlearn.training import gradient_checkpointing\n"
        "gradient_checkpointing.free_memory = lambda device: 0 if os.environ['RANK'] == '1' else 2**40\n"
        "main()\n"
    )
    keys = [f"model={tiny_model}", f"data={training_sets['harmful']}", f"output={tmp_path / 'run'}"]
    keys += ["training.max_steps=1", "training.precision=fp32", "training.gradient_checkpointing=auto"]
    for process in start_processes(2, ["train", "tiny/npo", *keys], program):
        _, err = process.communicate()
        assert process.wait() == 0, err[-3000:]
    assert RunDirectory(tmp_path / "run").read_manifest()["gradient_checkpointing"]["enabled"] is True


# Resuming


class Interrupt(TrainerCallback):
    """Interrupts training in the second step, when the first has its checkpoint."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("enabled", [False, True])
def test_a_resumed_run_keeps_the_choice(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    data = training_sets["harmful"]
    uninterrupted = trainer(tiny_model, data, tmp_path / "uninterrupted", enabled)
    uninterrupted.train()
    monkeypatch.setattr(gradient_checkpointing, "free_memory", lambda device: 0 if enabled else 2**40)
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny_model, data, tmp_path / "run", "auto", callbacks=[Interrupt()]).train()
    monkeypatch.setattr(gradient_checkpointing, "free_memory", lambda device: 2**40 if enabled else 0)
    resumed = trainer(tiny_model, data, tmp_path / "run", "auto")
    resumed.train(resume_from_checkpoint=True)
    assert checkpoints_layers(resumed) == enabled
    assert_equal(trained_weights(resumed), trained_weights(uninterrupted))


# Memory that is not enough


class OutOfMemory:
    """Raises an out-of-memory error in the middle of the backward passes with these numbers, counted from 0."""

    def __init__(self, layer: nn.Module, *numbers: int) -> None:
        self._passes = 0
        self._numbers = numbers
        layer.register_full_backward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._passes += 1
        if self._passes - 1 in self._numbers:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def losses(trained: MethodTrainer) -> list[dict[str, float]]:
    return [{name: entry.get(name) for name in ("step", "forget", "retain")} for entry in trained.state.log_history]


def memory_settings(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / "complete.json").read_text())["memory"])


@pytest.mark.parametrize("failing_pass", [0, 2])
def test_a_step_without_enough_memory_is_repeated_with_checkpointing(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, failing_pass: int
) -> None:
    data, choices = training_sets["harmful"], list[CheckpointingChoice]()
    expected = trainer(tiny_model, data, tmp_path / "on", True)
    expected.train()
    automatic = trainer(tiny_model, data, tmp_path / "auto", "auto")
    automatic._on_checkpointing = choices.append
    OutOfMemory(automatic.vlm.decoder_layers[0], failing_pass)
    automatic.train()
    assert [choice.enabled for choice in choices] == [False, True]
    assert_equal(trained_weights(automatic), trained_weights(expected))
    assert losses(automatic) == losses(expected)
    assert memory_settings(tmp_path / "auto" / "checkpoint-3") == {"gradient_checkpointing": True, "max_tokens": None}


@pytest.mark.parametrize("setting", ["auto", False])
def test_fewer_micro_batches_run_together_before_checkpointing_is_switched_on(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, setting: object
) -> None:
    """The six micro-batches of a step run together, then in fewer tokens until a step fits."""
    data = training_sets["harmful"]
    together = {"tokens_per_pass": 10**6, "gradient_accumulation_steps": 6}
    automatic = trainer(tiny_model, data, tmp_path / "auto", setting, arguments=together)
    OutOfMemory(automatic.vlm.decoder_layers[0], 0, 2)  # of the step as a whole, and in the second of two halves
    automatic.train()
    assert not checkpoints_layers(automatic)
    limit = memory_settings(tmp_path / "auto" / "checkpoint-3")["max_tokens"]
    assert 0 < limit < 10**4
    expected = trainer(tiny_model, data, tmp_path / "few", False, arguments={**together, "tokens_per_pass": limit})
    expected.train()
    assert_equal(trained_weights(automatic), trained_weights(expected))
    assert losses(automatic) == losses(expected)


def test_checkpointing_is_switched_on_when_each_micro_batch_runs_alone(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    data = training_sets["harmful"]
    automatic = trainer(tiny_model, data, tmp_path / "run", "auto", arguments={"tokens_per_pass": 10**6})
    OutOfMemory(automatic.vlm.decoder_layers[0], 0, 1)  # of three micro-batches together, and of the first alone
    automatic.train()
    settings = memory_settings(tmp_path / "run" / "checkpoint-3")
    assert settings["gradient_checkpointing"]
    arguments = {"tokens_per_pass": settings["max_tokens"]}
    expected = trainer(tiny_model, data, tmp_path / "expected", True, arguments=arguments)
    expected.train()
    assert_equal(trained_weights(automatic), trained_weights(expected))


def test_a_resumed_run_keeps_what_saved_memory(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    data, together = training_sets["harmful"], {"tokens_per_pass": 10**6}
    uninterrupted = trainer(tiny_model, data, tmp_path / "uninterrupted", "auto", arguments=together)
    OutOfMemory(uninterrupted.vlm.decoder_layers[0], 0)
    uninterrupted.train()
    interrupted = trainer(tiny_model, data, tmp_path / "run", "auto", arguments=together, callbacks=[Interrupt()])
    OutOfMemory(interrupted.vlm.decoder_layers[0], 0)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = trainer(tiny_model, data, tmp_path / "run", "auto", arguments=together)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(trained_weights(resumed), trained_weights(uninterrupted))


@pytest.mark.parametrize(("setting", "failures"), [(False, 1), (True, 1), ("auto", 2)])
def test_memory_that_is_not_enough_is_an_error_with_advice(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, setting: object, failures: int
) -> None:
    failing = trainer(tiny_model, training_sets["harmful"], tmp_path, setting)
    OutOfMemory(failing.vlm.decoder_layers[0], *range(failures))
    with raises_code("out-of-memory", RunError) as caught:
        failing.train()
    assert "per_device_train_batch_size" in str(caught.value)


def test_defended_steps_that_run_out_of_memory_are_an_error_with_advice(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    failing = trainer(tiny_model, training_sets["harmful"], tmp_path, "auto", arguments={"defense": "sam"})
    OutOfMemory(failing.vlm.decoder_layers[0], 0)
    with raises_code("out-of-memory", RunError):
        failing.train()


def test_other_errors_of_a_step_are_raised_as_they_are(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    failing = trainer(tiny_model, training_sets["harmful"], tmp_path, "auto")

    def fail(*_: Any) -> None:
        raise RuntimeError("another error")

    failing.vlm.decoder_layers[0].register_full_backward_hook(fail)
    with pytest.raises(RuntimeError, match="another error"):
        failing.train()


# Arguments


@pytest.mark.parametrize("value", ["auto", True, False, None, "true", "False"])
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_accept_auto_and_truth_values(tmp_path: Path, name: str, value: object) -> None:
    arguments = UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    expected = "auto" if value == "auto" else str(value).lower() == "true"
    assert arguments.gradient_checkpointing == arguments.activation_checkpointing == expected
    with raises_code("invalid-field", field="gradient_checkpointing"):
        UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, **{name: "sometimes"})


@pytest.mark.parametrize(("flags", "expected"), [(["auto"], "auto"), ([], True), (["false"], False)])
def test_command_lines_of_scripts_accept_auto(tmp_path: Path, flags: list[str], expected: object) -> None:
    parser = HfArgumentParser(UnlearningConfig)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--tokens_per_pass", "500", "--gradient_checkpointing", *flags]
    )
    assert (arguments.gradient_checkpointing, arguments.tokens_per_pass) == (expected, 500)


# Sizes


@pytest.mark.parametrize(
    ("method", "weight"), [("gd", 0.5), ("po", 0.0), ("idk_dpo", 0.0), ({"name": "kl", "paper_compat": True}, 0.0)]
)
def test_no_pass_is_larger_than_the_largest(
    tiny_model: Path, training_sets: dict[str, Path], method: object, weight: float
) -> None:
    scene = StepScene(tiny_model, training_sets["safe_eraser"], method, weight)
    longest = {role: scene.collator().longest_sample(role) for role in scene.method.requirements.roles}
    batches = scene.micro_batches(3, 20)
    for setting in (0, "auto", 10**6):
        tokens, logits = largest_pass(longest, scene.method, 3, 20, setting)
        limit = tokens_per_pass(setting, max(map(micro_batch_size, batches)))
        for group in group_micro_batches(batches, limit):
            assert sum(map(micro_batch_size, group)) <= tokens
            labels = [values["labels"] for batch in group for values in batch.values()]
            assert sum(int((values >= 0).sum()) for values in labels) <= logits
    longest_forget = max(
        int(scene.collator().encode("forget", [scene.stream(200)[number]["forget"]])["attention_mask"].sum())
        for number in range(200)
    )
    assert longest["forget"][0] == longest_forget
