"""The log and the probes of a training run, its plan and preview, and the export of its model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import error_code, raises_code, recipe, run_in_process
from vlm_unlearn.config import ProbeConfig, Recipe, load
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.probe import build_probe
from vlm_unlearn.modeling import export
from vlm_unlearn.modeling.loader import load_model, load_processor, load_run_model, run_digest, run_model_folder
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.preview import preview
from vlm_unlearn.training.runner import run_plan, run_recipe


class ScriptedProbe:
    """A probe that returns the given rates in turn and records the weights of each call."""

    def __init__(self, *rates: Mapping[str, float | None]) -> None:
        self._rates = list(rates)
        self.weights: list[torch.Tensor] = []
        self.digest = "scripted"

    def __call__(self, model: Any) -> Mapping[str, float | None]:
        assert not model.training
        self.weights.append(down_projection(model).detach().clone())
        return self._rates[len(self.weights) - 1]


def down_projection(model: Any) -> torch.Tensor:
    return next(value for name, value in model.named_parameters() if "down_proj" in name)


def run_with_probe(tiny_model: Path, data: Path, output: Path, probe: ScriptedProbe, **rules: object) -> Path:
    config = {"suite": "suites/tiny", "eval_steps": 2, **rules}
    return run_recipe(recipe(tiny_model, data, output, "npo", probe=config, training={"max_steps": 10}), probe=probe)


def log_lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished_run(tiny_model: Path, training_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step. Copy it before changing it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    run_recipe(recipe(tiny_model, training_sets["harmful"], run, "npo", training={"max_steps": 1}))
    return run


# Probes


@pytest.mark.slow
def test_probe_stops_the_run_when_all_stop_rules_hold(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    probe = ScriptedProbe({"asr": 0.9, "utility": 0.9}, {"asr": 0.0, "utility": 0.4}, {"asr": 0.0, "utility": 0.95}, {})
    rules = {"asr": {"at_most": 0.05}, "utility": {"at_least": 0.9}}
    run_with_probe(tiny_model, training_sets["harmful"], tmp_path / "run", probe, stop_when=rules)
    lines = log_lines(tmp_path / "run")
    assert max(line["step"] for line in lines) == 6  # both rules hold at the third probe
    assert [line["probe/asr"] for line in lines if "probe/asr" in line] == [0.9, 0.0, 0.0]
    assert [line["stopped"] for line in lines if "stopped" in line] == ["stop_when holds"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["steps"], manifest["stopped"]) == (6, "stop_when holds")


@pytest.mark.slow
def test_probe_aborts_the_run_and_saves_the_best_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """The third probe lacks a metric and the fourth meets the abort rule: the weights of the second are the best."""
    probe = ScriptedProbe(
        {"asr": 0.5, "utility": 0.9},
        {"asr": 0.1, "utility": 0.8},
        {"asr": None, "utility": 1.0},
        {"asr": 0.0, "utility": 0.2, "degenerate_rate": 0.7},
    )
    rules = {"abort_when": {"degenerate_rate": {"at_least": 0.5}}, "keep_best": {"asr": -1.0, "utility": 1.0}}
    result = run_with_probe(tiny_model, training_sets["harmful"], tmp_path / "run", probe, **rules)
    stops = [(line["step"], line["stopped"]) for line in log_lines(tmp_path / "run") if "stopped" in line]
    assert stops == [(8, "abort_when holds: degenerate_rate 0.7")]
    saved = down_projection(load_model(result, "fp32"))
    assert torch.equal(saved, probe.weights[1])
    assert not torch.equal(saved, probe.weights[2])
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.slow
def test_probe_with_the_tiny_suite_logs_its_rates(
    tiny_model: Path, training_sets: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    rules = {"suite": "suites/tiny", "root": str(world), "eval_steps": 2, "num_questions": 2}
    config = ProbeConfig.model_validate(rules)
    processor = load_processor(tiny_model)
    probe = build_probe(config, str(tiny_model), processor)
    planned = plan(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", probe=rules))
    run_plan(planned, probe=probe)
    lines = [line for line in log_lines(tmp_path / "run") if "probe/asr" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for metric in ("degenerate_rate", "asr_attacked", "utility"):
        assert all(0 <= line[f"probe/{metric}"] <= 1 for line in lines)
    assert run_plan(planned) == tmp_path / "run" / "model"  # the recipe's probe is the one that was passed
    smaller_probe = build_probe(config.model_copy(update={"num_questions": 1}), str(tiny_model), processor)
    with raises_code("run-mismatch") as caught:
        run_plan(planned, probe=smaller_probe)
    assert "probe" in str(caught.value)


@pytest.mark.slow
def test_recipe_with_a_probe_runs_from_python_and_stops(
    tiny_model: Path, training_sets: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    """The recipe alone names the suite. Its rule holds from the first probe on."""
    rules = {
        "suite": "suites/tiny",
        "root": str(world),
        "eval_steps": 2,
        "num_questions": 1,
        "stop_when": {"degenerate_rate": {"at_most": 1.0}},
    }
    run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", probe=rules))
    probes = [line for line in log_lines(tmp_path / "run") if "probe/asr" in line]
    assert [(line["step"], line["stopped"]) for line in probes] == [(2, "stop_when holds")]
    assert all(0 <= probes[0][f"probe/{metric}"] <= 1 for metric in ("asr", "degenerate_rate", "utility"))


def test_probe_rule_with_an_unknown_metric_or_an_invalid_bound_is_rejected(tiny_model: Path, world: Path) -> None:
    config = {"suite": "suites/tiny", "root": str(world), "stop_when": {"asr_atacked": {"at_most": 0}}}
    with raises_code("unknown-name", field="probe.stop_when") as caught:
        build_probe(ProbeConfig.model_validate(config), str(tiny_model), load_processor(tiny_model))
    for token in ('"asr_atacked"', 'did you mean "asr_attacked"'):
        assert token in str(caught.value)
    keys = ["model=m", "data=d", "output=o", "probe.suite=s", "probe.stop_when.asr.at_most=5"]
    with pytest.raises(UserError) as caught:
        load(Recipe, Path("tiny/npo"), keys)
    assert "at_most" in str(caught.value)


@pytest.mark.slow
def test_run_with_a_probe_trains_the_weights_of_a_run_without(
    tiny_model: Path, training_sets: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    """Greedy generation uses no random numbers, so that dropout is the same."""
    trainable = {"mode": "lora", "lora": {"r": 4, "lora_dropout": 0.2}}
    config = ProbeConfig(suite=Path("suites/tiny"), root=world, eval_steps=1, num_questions=1)
    probe = build_probe(config, str(tiny_model), load_processor(tiny_model))
    adapters = []
    for name, changes in (("without", {}), ("with", {"probe": config.model_dump()})):
        run = recipe(tiny_model, training_sets["harmful"], tmp_path / name, "npo", trainable=trainable, **changes)
        folder = run_recipe(run, probe=probe if changes else None)
        adapters.append(load_file(folder / "adapter_model.safetensors"))
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


# The command, its plan and its preview


@pytest.mark.slow
def test_train_command_writes_curves_tensorboard_and_recipe(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    keys = [
        f"model={tiny_model}",
        f"data={training_sets['harmful']}",
        f"output={tmp_path / 'run'}",
        "training.report_to=[tensorboard]",
        "training.max_steps=3",
        "training.per_device_train_batch_size=2",
    ]
    done = run_in_process("train", "tiny/npo", *keys, "--json")
    assert done.returncode == 0, done.stderr
    assert "projector" in done.stderr  # the trainable parameters are printed before the first step
    with Image.open(json.loads(done.stdout)["loss"]) as curves:
        assert curves.size == (960, 540)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/retain")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["method"]["name"] == "npo"


def test_plan_of_a_7b_recipe_needs_no_weights(training_sets: dict[str, Path], tmp_path: Path) -> None:
    """By hand: full training holds 4 bytes for each of 7.06e9 weights and 8 for each of 6.76e9 trained ones (AdamW)."""
    keys = [f"data={training_sets['harmful']}", f"output={tmp_path / 'run'}"]
    done = run_in_process("train", "safety_mirage/npo_full_7b", *keys, "--plan", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["steps"] == printed["examples"]["forget"]  # one epoch with a batch size of 1
    assert printed["memory"]["weights"] == pytest.approx(7.06e9 * 4 / 2**30, rel=0.01)
    assert printed["memory"]["optimizer"] == pytest.approx(6.76e9 * 8 / 2**30, rel=0.01)
    assert printed["tokens_per_sample"]["forget"] > 576
    assert printed["gpus"]["80 GB"] == 2
    assert not (tmp_path / "run").exists()
    done = run_in_process("train", "tiny/npo", "model=nobody/unknown", *keys, "--plan")
    assert (done.returncode, error_code(done)) == (2, "model-not-found")
    assert "nobody/unknown" in done.stderr


@pytest.mark.slow
def test_preview_agrees_with_the_run(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    training = {
        "max_steps": None,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
    }
    rmu = {"name": "rmu", "layer": 0}
    rmu_recipe = recipe(tiny_model, training_sets["harmful"], tmp_path / "run", rmu, training=training)
    previewed = preview(rmu_recipe)
    run_recipe(rmu_recipe)
    assert max(line["step"] for line in log_lines(tmp_path / "run")) == previewed.steps == 8
    assert previewed.reference == "copy"
    table = json.loads((tmp_path / "run" / "trainable.json").read_text())
    assert [(row["part"], row["trained"], row["parameters"]) for row in table] == previewed.trainable


@pytest.mark.parametrize(
    ("method", "data", "tokens"),
    [
        ("mixed_sft", "harmful", ["warning: ", "24 of 24", "--harmful-answers"]),
        ("po", "harmful", []),
        ("npo", "harmful", []),
    ],
)
@pytest.mark.slow
def test_train_command_warns_if_the_forget_answers_do_not_fit_the_method(
    method: str, data: str, tokens: list[str], tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    keys = [f"model={tiny_model}", f"data={training_sets[data]}", f"output={tmp_path / 'run'}", "training.max_steps=1"]
    done = run_in_process("train", f"tiny/{method}", *keys, "training.per_device_train_batch_size=1")
    assert done.returncode == 0, done.stderr
    assert ("warning: " in done.stderr) == bool(tokens)
    assert all(token in " ".join(done.stderr.split()) for token in tokens), done.stderr


def test_finished_run_without_its_model_folder_is_rejected(
    tiny_model: Path, training_sets: dict[str, Path], finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    shutil.rmtree(run / "model")
    with raises_code("model-not-found", file=run):
        run_recipe(recipe(tiny_model, training_sets["harmful"], run, "npo", training={"max_steps": 1}))


# Export


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_exported_model_has_the_merged_weights_of_the_run(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    training = {"max_steps": 6, "learning_rate": 1e-2}
    trainable = {"mode": mode, "projector": "sine"}
    run_recipe(
        recipe(tiny_model, training_sets["safe_eraser"], tmp_path / "run", "po", trainable=trainable, training=training)
    )
    rate = {"value": 0.0, "low": 0.0, "high": 0.03, "n": 9, "failed": 2}
    summary = {"schema": 1, "rows": [{"model": "po | <b>", "judge": "k", "metrics": {"asr": rate}}]}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "summary.json").write_text(json.dumps(summary))
    arguments = ["--evaluation", tmp_path / "evaluation", "--out", tmp_path / "exported", "--json"]
    done = run_in_process("export", tmp_path / "run", *arguments)
    assert done.returncode == 0, done.stderr
    exported = Path(json.loads(done.stdout)["model"])
    loaded = AutoModelForImageTextToText.from_pretrained(exported).state_dict()
    assert AutoProcessor.from_pretrained(exported, backend="pil").chat_template
    merged = load_run_model(run_model_folder(str(tmp_path / "run")), "fp32")[0].state_dict()
    assert loaded.keys() == merged.keys()  # no adapters and no parametrizations
    assert all(torch.equal(loaded[name], value) for name, value in merged.items())
    assert not any("parametrizations" in name for name in load_file(exported / "model.safetensors"))
    card = (exported / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "0.0 [0.0, 3.0], 2 failed" in card
    assert "po &#124; &#60;b&#62;" in card
    assert str(tmp_path) not in card
    assert json.loads((exported / "unlearning_manifest.json").read_text())["finished"]
    done = run_in_process("export", tmp_path / "run", "--out", tmp_path / "exported")
    assert (done.returncode, error_code(done)) == (2, "output-exists")


@pytest.mark.slow
def test_export_of_adapters_after_their_base_has_changed_is_rejected(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    run_recipe(recipe(base, training_sets["harmful"], tmp_path / "run", "npo", trainable={"mode": "lora"}))
    weights = {name: value + 1 for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    done = run_in_process("export", tmp_path / "run", "--out", tmp_path / "exported")
    assert (done.returncode, error_code(done)) == (2, "run-mismatch")
    with raises_code("run-mismatch"):
        run_digest(run_model_folder(str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("broken", "code", "token"),
    [
        ("recipe.json", None, "recipe.json"),
        ("summary.json", None, "summary.json"),
        ("link", "output-exists", "out"),
        ("inside", "output-not-writable", "exported"),
        ("inside through a link", "output-not-writable", "exported"),
        ("no run", "run-not-found", "nothing"),
    ],
)
def test_export_with_invalid_input_or_output_is_rejected(
    broken: str, code: str | None, token: str, finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    out, options = tmp_path / "out", []
    match broken:
        case "recipe.json":
            (run / "recipe.json").write_text("[]")
        case "summary.json":
            (tmp_path / "summary.json").write_text("{}")
            options = ["--evaluation", tmp_path]
        case "link":
            (tmp_path / "target").mkdir()
            out.symlink_to(tmp_path / "target")
        case "inside":
            out = run / "model" / "exported"
        case "inside through a link":
            (tmp_path / "shortcut").symlink_to(run)
            out = tmp_path / "shortcut" / "exported"
        case "no run":
            run = tmp_path / "nothing"
    done = run_in_process("export", run, "--out", out, *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert token in done.stderr
    if code:
        assert error_code(done) == code


def test_failed_export_deletes_its_files_but_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = tmp_path / ".m.part" / "mine.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")

    def fail(run: Path, scratch: Path, precision: str, card: str) -> None:
        (scratch / "model.safetensors").touch()
        raise UserError("broken", code="test")

    monkeypatch.setattr(export, "_write_model", fail)
    with raises_code("test"):
        export.export_run(tmp_path / "run", tmp_path / "m", "auto", "")
    assert list(tmp_path.iterdir()) == [foreign.parent]
    assert foreign.read_text() == "mine"
