"""``vlm-unlearn sweep`` and ``train --seeds``: output, exit codes, report, and a missing package."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import error_code, run_in_process
from sweeps.sweep_scene import tiny_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def sweep_file(tiny_model: Path, training_sets: dict[str, Path], world: Path, tmp_path: Path) -> Path:
    space = {"training.learning_rate": [1e-4, 3e-3], "method.name": ["npo", "simnpo"]}
    sweep = tiny_sweep(tiny_model, training_sets["safe_eraser"], world, space, seeds=[0, 1])
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep.model_dump(mode="json", exclude_unset=True)))
    return file


def test_json_has_the_trials_and_the_front_and_nothing_else_is_printed(sweep_file: Path, tmp_path: Path) -> None:
    done = run_in_process("sweep", sweep_file, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["trials"]) == 4
    for trial in document["trials"]:
        assert trial["state"] == "complete"
        assert set(trial["params"]) == {"training.learning_rate", "method.name"}
        assert set(trial["values"]) == {"asr", "degenerate_rate"}
    numbers = {trial["number"] for trial in document["trials"]}
    assert {trial["number"] for trial in document["front"]} <= numbers
    page = (tmp_path / "out" / "report.html").read_text()
    for heading in ("Pareto front", "Chosen recipes", "Trials", "Seeds of the front", "Settings", "Limits"):
        assert heading in page
    assert page.count("<tr") >= 5
    assert re.search(r"with 2 seeds", page)
    assert "one seed" not in page
    again = run_in_process("sweep", sweep_file, "--out", tmp_path / "out", "--report-only")
    assert again.returncode == 0, again.stderr
    assert "4 complete" in again.stdout
    chosen = tmp_path / "out" / "choices" / "knee.yaml"
    trained = run_in_process("train", chosen, f"output={tmp_path / 'chosen'}", "--json")
    assert trained.returncode == 0, trained.stderr


def test_names_and_settings_are_escaped_in_the_report(sweep_file: Path, tmp_path: Path) -> None:
    from vlm_unlearn.config import Sweep, load
    from vlm_unlearn.reporting.sweeps.report import write_sweep_report
    from vlm_unlearn.sweeps.records import SweepResult, Trial

    evil = "<script>alert(1)</script>"
    sweep = load(Sweep, sweep_file)
    trial = Trial(number=0, params={"method.name": evil}, state="failed", error=evil)
    result = SweepResult(name=evil, objectives=sweep.objectives, trials=[trial], front=[])
    assert evil not in write_sweep_report(tmp_path, sweep, result).read_text()


def test_missing_optuna_is_one_error_with_the_command_that_installs_it(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else find(name, *rest)
    )
    done = run_in_process("sweep", sweep_file, "--out", tmp_path / "out")
    assert (done.returncode, error_code(done)) == (2, "missing-package")
    assert not (tmp_path / "out").exists()


def test_folder_of_something_else_is_not_used(sweep_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = run_in_process("sweep", sweep_file, "--out", tmp_path / "out")
    assert (done.returncode, error_code(done)) == (2, "output-exists")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


def arguments(model: Path, data: Path, output: Path) -> list[Any]:
    keys = [f"model={model}", f"data={data}", f"output={output}"]
    return ["train", "tiny/npo", *keys, "training.max_steps=2", "training.per_device_train_batch_size=2"]


def test_train_with_seeds_trains_one_model_for_each(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    command = arguments(tiny_model, training_sets["harmful"], tmp_path / "npo")
    done = run_in_process(*command, "--seeds", "0,7", "--json")
    assert done.returncode == 0, done.stderr
    models = [Path(run["model"]) for run in json.loads(done.stdout)["runs"]]
    assert [model.parent.name for model in models] == ["seed-0", "seed-7"]
    seeds = [json.loads((model.parent / "recipe.json").read_text())["training"]["seed"] for model in models]
    assert seeds == [0, 7]
    assert (models[0] / "model.safetensors").read_bytes() != (models[1] / "model.safetensors").read_bytes()
    for value in ("0,0", "a", "", "-1"):
        assert error_code(run_in_process(*command, "--seeds", value)) == "invalid-value"


def test_aborted_training_has_an_exit_code_of_its_own(
    tiny_model: Path, training_sets: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    probe = f"probe={{suite: suites/tiny, root: {world}, num_questions: 1, eval_steps: 1"
    command = arguments(tiny_model, training_sets["harmful"], tmp_path / "aborted")
    done = run_in_process(*command, f"{probe}, abort_when: {{degenerate_rate: {{at_least: 0}}}}}}", "--json")
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["stopped"]
    command = arguments(tiny_model, training_sets["harmful"], tmp_path / "stopped")
    done = run_in_process(*command, f"{probe}, stop_when: {{degenerate_rate: {{at_least: 0}}}}}}", "--json")
    assert done.returncode == 0, done.stderr
