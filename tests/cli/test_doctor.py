"""``vlm-unlearn doctor`` lists versions, devices, folders and problems, and prints no secret.

test_startup.py checks that it loads nothing heavy.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers import run_in_process as run
from vlm_unlearn.cli import doctor


def test_doctor_prints_versions_memory_and_folders_but_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    text = run("doctor")
    assert text.returncode == 0, text.stderr
    assert "transformers  " in text.stdout
    assert "OPENAI_API_KEY is set" in text.stdout
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["torch"].startswith("2.")
    assert found["machine"]["memory"]["total"] > 2**28
    assert found["folders"]["cache"]["path"] == str(tmp_path / "cache")
    assert "sk-very" not in text.stdout + text.stderr + done.stdout + done.stderr
    assert not (tmp_path / "cache").exists()


def test_cache_folder_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_bytes(b"0" * 1000)
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path))
    assert doctor.diagnosis()["folders"]["cache"]["used"] == 1000
    assert doctor._used(tmp_path / "base", seconds=-1) is None  # too many files to count


def test_problems_come_with_their_fixes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 143000'\necho 'broken line'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("WORLD_SIZE", "4")
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28"}
    monkeypatch.setattr(
        doctor, "_version", lambda name: versions.get(name, None if name in ("openai", "vllm") else "1.0")
    )
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 2**60)
    found = doctor.diagnosis()
    assert found["machine"]["gpus"] == [{"name": "NVIDIA H200", "memory": 143771 * 2**20, "free": 143000 * 2**20}]
    problems = " | ".join(found["problems"])
    for token in (
        "pip install -c constraints.txt openai",
        "2.13.0+cpu",
        "torchvision",
        "VLM_UNLEARN_CACHE",
        "WORLD_SIZE",
    ):
        assert token in problems
    vllm = next(extra for extra in found["optional"] if extra["package"] == "vllm")
    assert (vllm["version"], vllm["install"]) == (None, "pip install '.[vllm]'")


def test_problems_go_to_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    done = run("doctor")
    assert (done.returncode, "problem: WORLD_SIZE " in done.stderr) == (0, True)


@pytest.mark.parametrize(
    ("cache", "problem"), [("~nosuchuser/x", ""), ("{folder}/file", "file (cache)"), ("\x1b[31m", "")]
)
def test_doctor_answers_with_odd_tools_and_folders(
    cache: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_bytes(b"#!/bin/sh\nprintf 'NVIDIA \\377 GB10, 1000, [N/A]\\nother, [N/A], [N/A]\\n'\n")
    tool.chmod(0o755)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("VLM_UNLEARN_CACHE", cache.format(folder=tmp_path))
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert "GB10, 1.0 GiB, unknown free" in done.stdout
    assert "other, unknown, unknown free" in done.stdout
    assert problem in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
