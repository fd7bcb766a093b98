"""`evaluate` with several models: shared prompts and judges, one report, and errors of single models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import raises_code, run_in_process
from vlm_unlearn.evaluation import many_models
from vlm_unlearn.evaluation.many_models import find_models
from vlm_unlearn.store import RunDirectory

FAST = ("generation.max_new_tokens=3", "sample.num_questions=4")


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and a folder that is none. The base is in a training run."""
    folder = tmp_path_factory.mktemp("runs")
    RunDirectory(folder / "base").open({"kind": "train"})
    shutil.copytree(tiny_model, folder / "base" / "model")
    shutil.copytree(tiny_model, folder / "npo")
    weights = load_file(tiny_model / "model.safetensors")
    noise = torch.Generator().manual_seed(1)
    changed = {name: value + 0.3 * torch.randn(value.shape, generator=noise) for name, value in weights.items()}
    save_file(changed, folder / "npo" / "model.safetensors", {"format": "pt"})
    (folder / "notes").mkdir()
    return folder


def test_names_of_lists_and_patterns(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_models("org/model") is None
    assert find_models(["org/llava", "runs/npo/model"]) == {"llava": "org/llava", "npo": "runs/npo/model"}
    assert find_models(["a/npo", "b/npo"]) == {"a_npo": "a/npo", "b_npo": "b/npo"}
    assert find_models(f"{models}/*") == {"base": str(models / "base"), "npo": str(models / "npo")}
    assert list(find_models(["org/base", f"{models}/n*"]) or {}) == ["base", "npo"]
    monkeypatch.setenv("HOME", str(models))
    assert list(find_models("~/n*") or {}) == ["npo"]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ([], "missing-setting"),
        ([3], "invalid-value"),
        (["a", "a"], "duplicate-id"),
        (["a/x/npo", "b/x/npo"], "duplicate-id"),
        ("{models}/q*", "model-not-found"),
        (["{models}/not*"], "model-not-found"),
    ],
)
def test_invalid_models(value: object, code: str, models: Path) -> None:
    def fill(entry: object) -> object:
        return entry.format(models=models) if isinstance(entry, str) else entry

    with raises_code(code, field="model"):
        find_models([fill(entry) for entry in value] if isinstance(value, list) else fill(value))


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
    calls: list[object] = []
    function: Callable[..., object] = getattr(owner, name)

    def wrapper(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


@pytest.mark.timeout(300)
def test_models_share_prompts_and_judges_and_are_compared_with_the_first(
    models: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prompts = counted(monkeypatch, many_models, "suite_prompts")
    judges = counted(monkeypatch, many_models, "build_judge")
    arguments = ("evaluate", "suites/tiny", f"root={world}", *FAST, f"model={models}/*", "--json")
    done = run_in_process(*arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    assert (len(prompts), len(judges)) == (1, 1)
    summary = json.loads(done.stdout)
    assert [row["model"] for row in summary["rows"]] == ["base", "npo"]
    assert {comparison["model"] for comparison in summary["comparisons"]} == {"npo"}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "npo" in (out / "report.html").read_text()

    # Each has the rates that it has alone, and the folder works with the other commands.
    single = run_in_process(
        "evaluate", "suites/tiny", f"root={world}", *FAST, f"model={models}/npo", "--json", "--out", tmp_path / "npo"
    )
    assert json.loads(single.stdout)["rows"][0] == summary["rows"][1]
    assert run_in_process("report", out, "--out", tmp_path / "report").returncode == 0

    # Several processes at the same time give the same answers.
    parallel = run_in_process(*arguments, "--processes", 2, "--out", tmp_path / "parallel")
    assert parallel.returncode == 0, parallel.stderr
    assert json.loads(parallel.stdout)["rows"] == summary["rows"]
    for name in ("base", "npo"):
        responses = [(folder / "evaluations" / name / "responses.jsonl") for folder in (out, tmp_path / "parallel")]
        assert responses[0].read_bytes() == responses[1].read_bytes()

    # Again: nothing is generated. Another model joins.
    monkeypatch.setattr("vlm_unlearn.generation.hf.load_run_model", lambda *_: pytest.fail("a model is loaded"))
    again = run_in_process(*arguments, "--out", out)
    assert json.loads(again.stdout) == summary


@pytest.mark.timeout(300)  # the processes import torch, which takes long on a busy machine
@pytest.mark.parametrize("processes", [1, 2])
def test_a_broken_model_does_not_stop_the_others(models: Path, world: Path, tmp_path: Path, processes: int) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models / "npo", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    out = tmp_path / "out"
    names = f"model=[{models}/base,{broken},{models}/npo]"
    arguments = ("evaluate", "suites/tiny", f"root={world}", *FAST, names, "--processes", processes, "--out", out)
    done = run_in_process(*arguments, "--json")
    assert done.returncode == 2
    assert "broken: " in done.stderr
    assert [row["model"] for row in json.loads(done.stdout)["rows"]] == ["base", "npo"]
    shutil.copy(models / "npo" / "model.safetensors", broken)
    repaired = run_in_process(*arguments, "--json")
    assert repaired.returncode == 0, repaired.stderr
    assert [row["model"] for row in json.loads(repaired.stdout)["rows"]] == ["base", "broken", "npo"]


def test_options_of_one_model_are_rejected(
    models: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("evaluate", "suites/tiny", f"root={world}", f"model={models}/*", "--out", tmp_path / "out")
    named = run_in_process(*arguments, "--name", "x")
    assert named.returncode == 2
    assert "--name" in named.stderr
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    launched = run_in_process(*arguments)
    assert launched.returncode == 2
    assert "accelerate launch" in launched.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_contents_is_left_alone(models: Path, world: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = run_in_process("evaluate", "suites/tiny", f"root={world}", f"model={models}/*", "--out", tmp_path)
    assert done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_every_gpu_gets_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import queue

    for visible, expected in (("", ["0", "1"]), ("4,7", ["4", "7"])):
        devices: queue.SimpleQueue[int] = queue.SimpleQueue()
        devices.put(0)
        devices.put(1)
        taken = []
        for _ in range(2):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            many_models._take_device(devices)
            taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
        assert taken == expected
