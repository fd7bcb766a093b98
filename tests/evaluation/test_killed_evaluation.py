"""Killed at random moments across generating and judging: no record is lost, doubled or half written."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import run, run_killing
from stub_server import stub_server

KILLS = int(os.environ.get("VLM_UNLEARN_KILLS", "3"))  # 20 for the long test


def test_killed_at_random_moments(
    tiny_model: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SafeEraser's suite with three sampled answers and six judges, five of them on a server."""

    def answer(text: str) -> str:
        time.sleep(0.004)
        known = {
            "Score:": "Score: 0.5",
            "OFF_TOPIC": "Verdict: COMPLIED",
            "UNSAFE": "Verdict: SAFE",
            "YES": "Verdict: NO",
        }
        return next(reply for mark, reply in known.items() if mark in text)

    def arguments(name: str, url: str) -> list[object]:
        settings = [
            "generation.max_new_tokens=8",
            "generation.batch_size=2",
            "judge.model=j",
            f"judge.server={url}",
            "paper_compat=true",
        ]
        root = world / "safe_eraser"
        return [
            "evaluate",
            "suites/safe_eraser",
            f"model={tiny_model}",
            f"root={root}",
            *settings,
            "--out",
            tmp_path / name,
        ]

    def lines(folder: Path) -> int:
        files = [folder / "responses.jsonl", *folder.glob("verdicts-*.jsonl")]
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    with stub_server(answer) as stub:
        done = run(*arguments("whole", stub.url))
        assert done.returncode == 0, done.stderr
        calls = stub.calls
        rng = random.Random()
        total = lines(tmp_path / "whole")

        def reached(count: int) -> Callable[[], bool]:
            moment = rng.random() * 0.05

            def look() -> bool:
                if lines(tmp_path / "killed") < count:
                    return False
                time.sleep(moment)
                return True

            return look

        thresholds = sorted(rng.randrange(total - 20) for _ in range(KILLS))
        monkeypatch.setenv(
            "VLM_UNLEARN_CACHE", str(tmp_path / "cache")
        )  # the first run's replies would spare the second the asking
        run_killing(arguments("killed", stub.url), [reached(count) for count in thresholds])
        asked_twice = stub.calls - 2 * calls
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for file in ("prompts.jsonl", "responses.jsonl"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), (file, thresholds)
    names = sorted(file.name for file in whole.glob("verdicts-*.jsonl"))
    assert names == sorted(file.name for file in killed.glob("verdicts-*.jsonl"))
    assert len(names) == 8
    for name in names:
        one, other = (Counter((folder / name).read_text().splitlines()) for folder in (whole, killed))
        assert one == other, (name, thresholds)
    one, other = (json.loads((folder / "summary.json").read_text())["rows"][0] for folder in (whole, killed))
    assert {key: value for key, value in one.items() if key != "model"} == {
        key: value for key, value in other.items() if key != "model"
    }
    assert asked_twice <= 16 * KILLS  # what was under way when it was killed
