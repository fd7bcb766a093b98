"""What a run tells while it trains, the probes that stop it, and what it exports."""

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

from helpers import raises_code, recipe, run
from vlm_unlearn.config import ProbeConfig, Recipe, load
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.probe import build_probe
from vlm_unlearn.models import export
from vlm_unlearn.models.loader import load_model, load_processor, load_run_model, run_digest, run_model_folder
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.preview import preview
from vlm_unlearn.training.runner import run_plan, run_recipe


class Scripted:
    """A probe that says what it was told to say, and notes the weights that it was asked about."""

    def __init__(self, *rates: Mapping[str, float | None]) -> None:
        self._rates = list(rates)
        self.weights: list[torch.Tensor] = []
        self.digest = "scripted"

    def __call__(self, model: Any) -> Mapping[str, float | None]:
        assert not model.training
        self.weights.append(
            next(value for name, value in model.named_parameters() if "down_proj" in name).detach().clone()
        )
        return self._rates[len(self.weights) - 1]


def probed(tiny_model: Path, data: Path, output: Path, probe: Scripted, **rules: object) -> Path:
    config = {"suite": "suites/tiny", "eval_steps": 2, **rules}
    return run_recipe(recipe(tiny_model, data, output, "npo", probe=config, training={"max_steps": 10}), probe=probe)


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_probe_stops_the_run_once_it_has_forgotten(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    rates = Scripted({"asr": 0.9, "utility": 0.9}, {"asr": 0.0, "utility": 0.4}, {"asr": 0.0, "utility": 0.95}, {})
    stop = {"asr": {"at_most": 0.05}, "utility": {"at_least": 0.9}}
    probed(tiny_model, training_sets["harmful"], tmp_path / "run", rates, stop_when=stop)
    lines = log(tmp_path / "run")
    assert max(line["step"] for line in lines) == 6  # only at the third probe do both hold
    assert [line["probe/asr"] for line in lines if "probe/asr" in line] == [0.9, 0.0, 0.0]
    assert [line["stopped"] for line in lines if "stopped" in line] == ["stop_when holds"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["steps"], manifest["stopped"]) == (6, "stop_when holds")


def test_a_probe_aborts_and_the_best_weights_are_kept(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """The third is the best but for what it doesn't know, and the fourth is broken."""
    broken = {"asr": 0.0, "utility": 0.2, "degenerate_rate": 0.7}
    rates = Scripted({"asr": 0.5, "utility": 0.9}, {"asr": 0.1, "utility": 0.8}, {"asr": None, "utility": 1.0}, broken)
    rules = {"abort_when": {"degenerate_rate": {"at_least": 0.5}}, "keep_best": {"asr": -1.0, "utility": 1.0}}
    result = probed(tiny_model, training_sets["harmful"], tmp_path / "run", rates, **rules)
    stops = [(line["step"], line["stopped"]) for line in log(tmp_path / "run") if "stopped" in line]
    assert stops == [(8, "abort_when holds: degenerate_rate 0.7")]
    saved = load_model(result, "fp32")
    kept = next(value for name, value in saved.named_parameters() if "down_proj" in name)
    assert torch.equal(kept, rates.weights[1])
    assert not torch.equal(kept, rates.weights[2])
    assert not (tmp_path / "run" / "best").exists()


def test_the_tiny_suite_probes(tiny_model: Path, training_sets: dict[str, Path], world: Path, tmp_path: Path) -> None:
    config = ProbeConfig(suite=Path("suites/tiny"), root=world, every=2, groups=2)
    probe = build_probe(config, str(tiny_model), load_processor(tiny_model))
    rules = {"suite": "suites/tiny", "root": str(world), "eval_steps": 2, "num_questions": 2}
    planned = plan(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", probe=rules))
    run_plan(planned, probe=probe)
    probes = [line for line in log(tmp_path / "run") if "probe/asr" in line]
    assert [line["step"] for line in probes] == [2, 4]
    assert all(
        0 <= line[f"probe/{metric}"] <= 1
        for line in probes
        for metric in ("degenerate_rate", "asr_attacked", "utility")
    )
    with raises_code("unknown-name", field="probe.stop_when") as caught:
        build_probe(
            ProbeConfig.model_validate({**rules, "stop_when": {"asr_atacked": {"at_most": 0}}}),
            str(tiny_model),
            load_processor(tiny_model),
        )
    assert 'did you mean "asr_attacked"' in str(caught.value)
    with pytest.raises(UserError, match="the recipe has a probe"):
        run_plan(planned)
    other = build_probe(config.model_copy(update={"num_questions": 1}), str(tiny_model), load_processor(tiny_model))
    with pytest.raises(UserError, match="different: probe"):
        run_plan(planned, probe=other)
    with pytest.raises(UserError, match=r"at_most: Input should be less than or equal to 1"):
        load(
            Recipe,
            Path("tiny/npo"),
            ["model=m", "data=d", "output=o", "probe.suite=s", "probe.stop_when.asr.at_most=5"],
        )


def test_probing_changes_nothing(tiny_model: Path, training_sets: dict[str, Path], world: Path, tmp_path: Path) -> None:
    """Greedy answers draw no random numbers: dropout falls as it does without a probe."""
    lora = {"mode": "lora", "lora": {"r": 4, "lora_dropout": 0.2}}
    bare = run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "bare", "npo", trainable=lora))
    config = ProbeConfig(suite=Path("suites/tiny"), root=world, every=1, groups=1)
    wanted = recipe(
        tiny_model, training_sets["harmful"], tmp_path / "probed", "npo", trainable=lora, probe=config.model_dump()
    )
    probed = run_recipe(wanted, probe=build_probe(config, str(tiny_model), load_processor(tiny_model)))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (bare, probed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_curves_tensorboard_and_recipe_are_left_in_the_folder(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    keys = [
        f"model={tiny_model}",
        f"data={training_sets['harmful']}",
        f"output={tmp_path / 'run'}",
        "training.report_to=[tensorboard]",
    ]
    done = run("train", "tiny/npo", *keys, "training.max_steps=3", "training.per_device_train_batch_size=2", "--json")
    assert done.returncode == 0, done.stderr
    assert "projector" in done.stderr  # what trains is told before the first step
    result = json.loads(done.stdout)
    with Image.open(result["loss"]) as curves:
        assert curves.size == (960, 540)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/retain")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["method"]["name"] == "npo"


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_export_answers_as_the_run(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, mode: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    training = {"max_steps": 6, "learning_rate": 1e-2}
    trainable = {"mode": mode, "projector": "sine"}
    run_recipe(
        recipe(tiny_model, training_sets["safe_eraser"], tmp_path / "run", "po", trainable=trainable, training=training)
    )
    summary = {
        "schema": 1,
        "rows": [
            {
                "model": "po | <b>",
                "judge": "k",
                "metrics": {"asr": {"value": 0.0, "low": 0.0, "high": 0.03, "n": 9, "failed": 2}},
            }
        ],
    }
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "summary.json").write_text(json.dumps(summary))
    done = run(
        "export", tmp_path / "run", "--evaluation", tmp_path / "evaluation", "--out", tmp_path / "exported", "--json"
    )
    assert done.returncode == 0, done.stderr
    exported = Path(json.loads(done.stdout)["model"])
    shipped = AutoModelForImageTextToText.from_pretrained(exported)
    assert AutoProcessor.from_pretrained(exported, backend="pil").chat_template
    merged, _ = load_run_model(run_model_folder(str(tmp_path / "run")), "fp32")
    assert shipped.state_dict().keys() == merged.state_dict().keys()  # no trace of adapters or parametrizations
    assert all(torch.equal(shipped.state_dict()[name], value) for name, value in merged.state_dict().items())
    assert not any("parametrizations" in name for name in load_file(exported / "model.safetensors"))
    card = (exported / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "0.0 [0.0, 3.0], 2 failed" in card
    assert "po &#124; &#60;b&#62;" in card
    assert str(tmp_path) not in card
    assert json.loads((exported / "unlearning_manifest.json").read_text())["finished"]
    again = run("export", tmp_path / "run", "--out", tmp_path / "exported")
    assert again.returncode == 2
    assert "is not empty" in again.stderr


def test_plan_needs_no_weights(training_sets: dict[str, Path], tmp_path: Path) -> None:
    """By hand: 7B full in bf16 holds 4 bytes a weight, 4 a gradient, 8 of AdamW: 6.76e9 trained, 7.06e9 in all."""
    keys = [f"data={training_sets['harmful']}", f"output={tmp_path / 'run'}"]
    done = run("train", "safety_mirage/npo_full_7b", *keys, "--plan", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] == found["examples"]["forget"]  # one epoch of batches of one
    assert found["memory"]["weights"] == pytest.approx(7.06e9 * 4 / 2**30, rel=0.01)
    assert found["memory"]["optimizer"] == pytest.approx(6.76e9 * 8 / 2**30, rel=0.01)
    assert found["tokens_per_sample"]["forget"] > 576
    assert found["gpus"]["80 GB"] == 2
    assert not (tmp_path / "run").exists()
    done = run("train", "tiny/npo", "model=nobody/unknown", *keys, "--plan")
    assert done.returncode == 2
    assert "its config.json is not on this machine" in done.stderr


def test_the_plan_is_what_is_run(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    training = {
        "max_steps": None,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
    }
    wanted = recipe(
        tiny_model, training_sets["harmful"], tmp_path / "run", {"name": "rmu", "layer": 0}, training=training
    )
    told = preview(wanted)
    run_recipe(wanted)
    assert max(line["step"] for line in log(tmp_path / "run")) == told.steps == 8
    assert told.reference == "copy"
    table = json.loads((tmp_path / "run" / "trainable.json").read_text())
    assert [(row["part"], row["trained"], row["parameters"]) for row in table] == told.trainable


def test_adapters_on_a_base_that_has_changed_are_refused(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    run_recipe(recipe(base, training_sets["harmful"], tmp_path / "run", "npo", trainable={"mode": "lora"}))
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: value + 1 for name, value in weights.items()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    done = run("export", tmp_path / "run", "--out", tmp_path / "exported")
    assert done.returncode == 2
    assert "[run-mismatch]" in done.stderr
    with pytest.raises(UserError, match="were trained on a base model"):
        run_digest(run_model_folder(str(tmp_path / "run")))


def test_a_finished_run_that_has_lost_its_model_says_so(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    wanted = recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo")
    shutil.rmtree(run_recipe(wanted))
    with pytest.raises(UserError, match=r"is finished, and its model folder is gone; delete .* and train again"):
        run_recipe(wanted)


@pytest.mark.parametrize(
    ("method", "data", "warning"),
    [
        (
            "mixed_sft",
            "harmful",
            "24 of 24 forget answers are no refusals, and mixed_sft teaches its model to give them",
        ),
        ("npo", "refusals", "forget answers are refusals, and npo makes its model unlearn them"),
        ("po", "harmful", ""),
        ("npo", "harmful", ""),
    ],
)
def test_a_set_that_teaches_the_wrong_thing_is_warned_of(
    method: str, data: str, warning: str, tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    keys = [f"model={tiny_model}", f"data={training_sets[data]}", f"output={tmp_path / 'run'}", "training.max_steps=1"]
    done = run("train", f"tiny/{method}", *keys, "training.per_device_train_batch_size=1")
    assert done.returncode == 0, done.stderr
    assert ("warning: " in done.stderr) == bool(warning)
    assert warning in " ".join(done.stderr.split())


@pytest.mark.parametrize("broken", ["recipe.json", "summary.json", "link", "inside", "inside through a link", "no run"])
def test_export_refuses_what_it_cannot_use(
    broken: str, tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", training={"max_steps": 1}))
    out, source, more = tmp_path / "out", tmp_path / "run", []
    match broken:
        case "recipe.json":
            (tmp_path / "run" / "recipe.json").write_text("[]")
        case "summary.json":
            (tmp_path / "summary.json").write_text("{}")
            more = ["--evaluation", tmp_path]
        case "link":
            (tmp_path / "target").mkdir()
            out.symlink_to(tmp_path / "target")
        case "inside":
            out = tmp_path / "run" / "model" / "exported"
        case "inside through a link":
            (tmp_path / "shortcut").symlink_to(tmp_path / "run")
            out = tmp_path / "shortcut" / "exported"
        case "no run":
            source = tmp_path / "nothing"
    done = run("export", source, "--out", out, *more)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    inside = dict.fromkeys(("inside", "inside through a link"), "[output-not-writable]")
    told = inside | {"link": "is a link", "no run": "is no folder that `vlm-unlearn train` wrote"}
    assert told.get(broken, broken) in done.stderr


def test_export_leaves_others_folders_alone_and_nothing_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / ".m.part" / "mine.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")

    def failing(run: Path, part: Path, precision: str, card: str) -> None:
        (part / "model.safetensors").touch()
        raise UserError("broken")

    monkeypatch.setattr(export, "_write_model", failing)
    with pytest.raises(UserError, match="broken"):
        export.export_run(tmp_path / "run", tmp_path / "m", "auto", "")
    assert list(tmp_path.iterdir()) == [foreign.parent]
    assert foreign.read_text() == "mine"
