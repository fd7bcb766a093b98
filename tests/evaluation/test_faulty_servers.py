"""An evaluation whose model and judge are on a server with 30 % faults, run three times in the same folder.

``benchmarks/server_faults.py`` runs it with hundreds of prompts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fault_server import fault_server
from faulty_evaluation import FaultyEvaluation, answer, check_runs

COUNT = 40


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(180)
def test_three_runs_on_a_server_with_faults_lose_nothing(tmp_path: Path) -> None:
    with fault_server(answer) as server:
        server.fixed = {"picture 0001": "large", "picture 0002": "bomb", "picture 0003": "endless"}
        evaluation = FaultyEvaluation(tmp_path, server, COUNT)
        generate: list[object] = ["generate", evaluation.suite, "--out", evaluation.run.path]
        judge: list[object] = ["judge", "run", evaluation.run.path]
        runs = [evaluation.repeat(generate, judge) for _ in range(3)]
    for run in runs:
        failed_answers, failed_verdicts = run.failed()
        assert f"{failed_answers} of {COUNT} answers failed" in run.notes
        assert f"{COUNT} verdicts, {failed_verdicts} failed" in run.notes
    assert server.first_faults[1] / server.questions[1] > 0.2
    check_runs(runs, limit=1000, growth=100)
