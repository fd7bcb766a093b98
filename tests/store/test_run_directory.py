"""The folder of a run: other runs and other files are rejected, one process at a time writes, and costs add up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.store import RunDirectory, package_versions, read_json, write_json


def test_open_starts_and_resumes_a_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "a")
    assert not run.exists()
    assert not run.is_finished
    manifest = run.open({"recipe": {"beta": 1, "path": Path("x")}})
    assert run.exists()
    assert manifest == read_json(tmp_path / "runs" / "a" / "manifest.json") == run.read_manifest()
    assert manifest == {
        "schema": 1,
        "identity": {"recipe": {"beta": 1, "path": "x"}},
        "versions": package_versions(),
        "wall_seconds": 0.0,
        "finished": False,
    }
    run.record_cost(1.25)
    assert RunDirectory(str(run.path)).open({"recipe": {"beta": 1, "path": Path("x")}})["wall_seconds"] == 1.25


def test_open_rejects_the_folder_of_another_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.open({"recipe": {"beta": 1, "seed": 0}})
    with raises_code("run-mismatch", file=tmp_path / "run") as caught:
        run.open({"recipe": {"beta": 2, "seed": 0}})
    assert "recipe.beta" in str(caught.value)
    assert "recipe.seed" not in str(caught.value)


def test_open_and_lock_reject_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with raises_code("output-exists", file=tmp_path):
        RunDirectory(tmp_path).open({})
    with raises_code("output-exists", file=tmp_path), RunDirectory(tmp_path).lock():
        pass
    with raises_code("not-a-folder", file=tmp_path / "notes.txt"), RunDirectory(tmp_path / "notes.txt").lock():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_hidden_files_do_not_make_a_folder_foreign(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*")
    RunDirectory(tmp_path).validate_contents()


def test_record_cost_adds_time_and_keeps_a_run_finished(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.open({})
    run.record_cost(1.0, finished=True, ended={"steps": 3, "stopped": None})
    run.record_cost(0.5)
    manifest = run.read_manifest()
    assert run.is_finished
    assert manifest["wall_seconds"] == 1.5
    assert manifest["steps"] == 3
    assert manifest["peak_memory_mb"] > 0


HOLD = """
import sys, time
from vlm_unlearn.store import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_lock_excludes_other_processes_and_ends_with_a_kill(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with raises_code("run-locked", file=run.path), run.lock():
            pass
    finally:
        process.kill()
        process.communicate()
    with run.lock():
        pass


def test_object_stands_for_its_path(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert Path(run) == tmp_path == RunDirectory(run).path
    assert repr(run) == f"RunDirectory({str(tmp_path)!r})"


@pytest.mark.parametrize("field", ["wall_seconds", "peak_memory_mb"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "1" + "0" * 400, '"1"'])
def test_manifest_with_an_invalid_cost_is_an_error(field: str, value: str, tmp_path: Path) -> None:
    costs = {"wall_seconds": "1.5", "peak_memory_mb": "100", field: value}
    written = ", ".join(f'"{name}": {amount}' for name, amount in costs.items())
    (tmp_path / "manifest.json").write_text(f'{{"identity": {{}}, "finished": true, {written}}}')
    with raises_code("invalid-manifest", file=tmp_path / "manifest.json"):
        RunDirectory(tmp_path).read_manifest()
    with raises_code("invalid-manifest", file=tmp_path / "manifest.json"):
        _ = RunDirectory(tmp_path).is_finished


def test_manifest_of_another_program_is_an_error(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"name": "an extension"})
    with raises_code("invalid-manifest", file=tmp_path / "manifest.json"):
        RunDirectory(tmp_path).open({})


def test_file_names_on_disk_do_not_change(tmp_path: Path) -> None:
    """Runs of earlier versions must resume, and other tools read these files."""
    run = RunDirectory(tmp_path)
    paths = {name: value.relative_to(tmp_path).as_posix() for name, value in vars(run).items() if name != "path"}
    assert paths == {
        "manifest_file": "manifest.json",
        "recipe_file": "recipe.json",
        "trainable_file": "trainable.json",
        "log_file": "log.jsonl",
        "loss_plot_file": "loss.png",
        "model": "model",
        "checkpoints": "checkpoints",
        "best_weights": "best",
        "tensorboard": "tensorboard",
    }
    checkpoint_names = (run.CHECKPOINT_COMPLETE, run.TRAINED_WEIGHTS, run.METHOD_STATE)
    assert checkpoint_names == ("complete.json", "trained.safetensors", "method_state.safetensors")
