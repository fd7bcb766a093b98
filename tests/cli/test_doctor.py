"""doctor says what is there and what is missing, loads nothing heavy, and tells no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import command, run
from vlm_unlearn.cli import doctor


def test_it_says_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    told = run("doctor")
    assert told.returncode == 0, told.stderr
    assert "transformers  " in told.stdout
    assert "OPENAI_API_KEY is set" in told.stdout
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["torch"].startswith("2.")
    assert found["machine"]["memory"]["total"] > 2**28
    assert found["folders"]["cache"]["path"] == str(tmp_path / "cache")
    assert "sk-very" not in told.stdout + told.stderr + done.stdout + done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_cache_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_bytes(b"0" * 1000)
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path))
    assert doctor.diagnosis()["folders"]["cache"]["used"] == 1000
    assert doctor._used(tmp_path / "base", seconds=-1) is None  # too many files to count


def test_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['vlm-unlearn', 'doctor', '--json']\nfrom vlm_unlearn.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'openai', 'numpy', 'plotly'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_missing_comes_with_its_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 143000'\necho 'broken line'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("WORLD_SIZE", "4")
    known = {"torch": "2.13.0+cpu", "torchvision": "0.28"}
    monkeypatch.setattr(doctor, "_version", lambda name: known.get(name, None if name in ("openai", "vllm") else "1.0"))
    monkeypatch.setattr(doctor, "GROWTH", 2**60)
    found = doctor.diagnosis()
    assert found["machine"]["gpus"] == [{"name": "NVIDIA H200", "memory": 143771 * 2**20, "free": 143000 * 2**20}]
    problems = " | ".join(found["problems"])
    for part in (
        "pip install -c constraints.txt openai",
        "is a CPU build beside 1 GPUs",
        "torchvision is installed",
        "VLM_UNLEARN_CACHE",
        "WORLD_SIZE",
    ):
        assert part in problems
    vllm = next(extra for extra in found["optional"] if extra["package"] == "vllm")
    assert (vllm["version"], vllm["install"]) == (None, "pip install '.[vllm]'")


def test_problems_go_to_standard_error(tmp_path: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "4"}
    environment.pop("MASTER_ADDR", None)
    done = subprocess.run(command("doctor"), capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, "problem: WORLD_SIZE is set without" in done.stderr) == (0, True)


def test_it_answers_whatever_it_finds(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_bytes(b"#!/bin/sh\nprintf 'NVIDIA \\377 GB10, 1000, [N/A]\\nother, [N/A], [N/A]\\n'\n")
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "file").touch()
    for cache, problem in (
        ("~nosuchuser/x", ""),
        (str(tmp_path / "file"), "file (cache): can't be written to"),
        ("\x1b[31m", ""),
    ):
        done = subprocess.run(
            command("doctor"),
            capture_output=True,
            text=True,
            check=False,
            env={**environment, "VLM_UNLEARN_CACHE": cache},
        )
        assert done.returncode == 0, done.stderr
        assert "GB10, 1.0 GiB, unknown free" in done.stdout
        assert "other, unknown, unknown free" in done.stdout
        assert problem in done.stderr
        assert "\x1b" not in done.stdout + done.stderr
