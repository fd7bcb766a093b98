"""An evaluation that is killed at random moments loses no record, duplicates none and leaves none half written."""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import run_killing
from stub_server import stub_server
from vlm_unlearn.config import Suite, load
from vlm_unlearn.evaluation.runner import evaluate_run

KILLS = int(os.environ.get("VLM_UNLEARN_KILLS", "3"))  # 20 for a soak test
SEED = int(os.environ.get("VLM_UNLEARN_KILL_SEED", "0"))  # chooses the moments of the kills


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_evaluation_at_random_moments_writes_the_same_records(
    tiny_model: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SafeEraser's suite with three sampled answers and six judges, five of them on a server."""

    def reply(text: str) -> str:
        time.sleep(0.004)
        replies = {
            "Score:": "Score: 0.5",
            "OFF_TOPIC": "Verdict: COMPLIED",
            "UNSAFE": "Verdict: SAFE",
            "YES": "Verdict: NO",
        }
        return next(reply for marker, reply in replies.items() if marker in text)

    def count_lines(folder: Path) -> int:
        files = [folder / "responses.jsonl", *folder.glob("verdicts-*.jsonl")]
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    complete, killed = tmp_path / "complete", tmp_path / "killed"
    with stub_server(reply) as stub:
        settings = [
            f"model={tiny_model}",
            f"root={world / 'safe_eraser'}",
            "generation.max_new_tokens=8",
            "generation.batch_size=2",
            "judge.model=j",
            f"judge.server={stub.url}",
            "paper_compat=true",
        ]
        evaluate_run(load(Suite, Path("suites/safe_eraser"), settings), complete, "m")
        calls = stub.calls
        rng = random.Random(SEED)
        thresholds = sorted(rng.randrange(count_lines(complete) - 20) for _ in range(KILLS))
        kills = [(threshold, rng.random() * 0.05) for threshold in thresholds]
        sys.stdout.write(f"seed {SEED}, kills at (lines, seconds later) {kills}\n")  # shown if the test fails

        def reached(count: int, delay: float) -> Callable[[], bool]:
            def is_reached() -> bool:
                if count_lines(killed) < count:
                    return False
                time.sleep(delay)
                return True

            return is_reached

        # With the cache of the complete run, the killed one would send no requests.
        monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
        arguments = ["evaluate", "suites/safe_eraser", *settings, "--name", "m", "--out", killed]
        run_killing(arguments, [reached(count, delay) for count, delay in kills])
        repeated_calls = stub.calls - 2 * calls
    for file in ("prompts.jsonl", "responses.jsonl", "summary.json"):
        assert (killed / file).read_bytes() == (complete / file).read_bytes(), file
    names = sorted(file.name for file in complete.glob("verdicts-*.jsonl"))
    assert names == sorted(file.name for file in killed.glob("verdicts-*.jsonl"))
    assert len(names) == 8
    for name in names:
        expected, actual = (Counter((folder / name).read_text().splitlines()) for folder in (complete, killed))
        assert actual == expected, name
    assert repeated_calls <= 16 * KILLS  # requests in flight at the time of a kill
