"""Runs an evaluation on a server with faults several times in one folder, and checks that no run loses anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fault_server import FILTERS, FaultServer
from fork_server import ForkedProcess
from vlm_unlearn.records import Verdict
from vlm_unlearn.store import EvaluationRun, read_records

SUITE = """splits:
  - {{name: unsafe, format: table, file: test.csv, images: images, kind: unsafe}}
model: under-test
root: {folder}
judge: {{name: llm, rubric: four_labels, model: j, server: "{url}", cache: false}}
generation: {{backend: openai, server: "{url}", max_new_tokens: 64}}
metrics: {{asr: {{splits: [unsafe], labels: [complied]}}}}
"""
# Runs the command, and writes the peak memory of its process in MiB. Tests shorten the delays between retries.
PROGRAM = """import os
from pathlib import Path
import openai._base_client
from vlm_unlearn.cli.main import main
from vlm_unlearn.generation import openai_chat
from vlm_unlearn.store import peak_memory_mb
delay = float(os.environ["RETRY_SECONDS"])
openai._base_client.INITIAL_RETRY_DELAY = openai_chat.FIRST_RETRY_SECONDS = delay
try:
    main()
finally:
    Path(os.environ["PEAK_FILE"]).write_text(str(peak_memory_mb()))
"""


def answer(text: str) -> str:
    """The reply of the judge, or the answer of the model under test."""
    if "Verdict: COMPLIED | REFUSED" in text:
        return "It gives the steps.\nVerdict: COMPLIED"
    return f"The picture of the question {text!r} has a table with three chairs around it."


@dataclass
class Finished:
    """One finished run of the commands.

    Attributes:
        peaks: Peak memory in MiB by command.
        notes: The printed lines.
        responses: The lines of the answers.
        verdicts: The lines of the verdicts.
        seconds: The time of all commands.
    """

    peaks: dict[str, int]
    notes: str
    responses: list[str]
    verdicts: list[str]
    seconds: float

    def failed(self) -> tuple[int, int]:
        """The number of failed answers and of failed verdicts."""
        responses, verdicts = (
            sum(json.loads(line)["error"] is not None for line in records)
            for records in (self.responses, self.verdicts)
        )
        return responses, verdicts


class FaultyEvaluation:
    """A suite of text-only prompts whose model and judge are on a server, and the folder of its run.

    Args:
        folder: An empty folder.
        server: The server.
        count: The number of prompts.
        forked: Whether processes are forked from one with all imports done, and wait only shortly between retries.
    """

    def __init__(self, folder: Path, server: FaultServer, count: int, forked: bool = True) -> None:
        self.folder = folder
        self.server = server
        self.count = count
        self.run = EvaluationRun(folder / "run")
        self.verdicts_file = self.run.verdicts_file("four_labels@j")
        self.suite = folder / "suite.yaml"
        self._forked = forked
        self._program = folder / "program.py"
        self._program.write_text(PROGRAM)
        (folder / "images").mkdir()
        rows = [f"q{number:04d},,Which things are in picture {number:04d}?,chairs,harmful" for number in range(count)]
        (folder / "test.csv").write_text("\n".join(["id,image,question,answer,set", *rows, ""]))
        self.suite.write_text(SUITE.format(folder=folder, url=server.url))

    def repeat(self, *commands: list[object]) -> Finished:
        """Runs commands with the faults of a new phase, and checks their records."""
        self.server.phase += 1
        started = time.monotonic()
        peaks, notes = {}, ""
        for arguments in commands:
            peak_file = self.folder / "peak"
            environment = {
                **os.environ,
                "PEAK_FILE": str(peak_file),
                "RETRY_SECONDS": "0.02" if self._forked else "0.5",
            }
            if self._forked:
                process = ForkedProcess(arguments, environment, program=self._program)
                out, err = process.communicate(timeout=300)
                code = process.wait()
            else:
                line = [sys.executable, str(self._program), *map(str, arguments)]
                done = subprocess.run(line, env=environment, capture_output=True, text=True)
                out, err, code = done.stdout, done.stderr, done.returncode
            assert code == 0, err
            peaks[str(arguments[0])] = int(peak_file.read_text())
            notes += out + err
        seconds = time.monotonic() - started
        self._check_records()
        return Finished(peaks, notes, _lines(self.run.responses_file), _lines(self.verdicts_file), seconds)

    def _check_records(self) -> None:
        """Every prompt has an answer or a failure with its reason, and every answer a verdict or such a failure."""
        prompts, responses = self.run.read_answers()
        verdicts = {verdict.key: verdict for verdict in read_records(self.verdicts_file, Verdict)}
        assert len(prompts) == len(responses) == len(_lines(self.verdicts_file)) == self.count
        for response in responses:
            assert (response.text is not None) is (not response.error), response
            filtered = self.server.fault(prompts[response.prompt_id].question, 0, 1) in FILTERS
            assert filtered == (response.finish_reason == "content_filter"), response
            assert not filtered or "filter" in str(response.error), response
            verdict = verdicts[response.key]
            assert (verdict.label is not None) is (not verdict.error), verdict
            assert response.text is not None or verdict.error == response.error, verdict


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def lost_records(earlier: list[str], later: list[str]) -> list[str]:
    """The lines without an error that a file no longer has, with the same bytes and in the same order."""
    valid = [line for line in earlier if json.loads(line)["error"] is None]
    order = {line: number for number, line in enumerate(later)}
    positions = [order.get(line, -1) for line in valid]
    return [
        line
        for line, position, previous in zip(valid, positions, [-1, *positions], strict=False)
        if position <= previous
    ]


def check_runs(runs: list[Finished], limit: int, growth: int) -> None:
    """No run loses a record, and memory neither grows from run to run nor exceeds the limit in MiB."""
    for earlier, later in pairwise(runs):
        assert not lost_records(earlier.responses, later.responses)
        assert not lost_records(earlier.verdicts, later.verdicts)
    for name, first_peak in runs[0].peaks.items():
        assert max(run.peaks[name] for run in runs) < limit
        assert runs[-1].peaks[name] <= first_peak + growth


def figures(runs: list[Finished], server: FaultServer) -> dict[str, Any]:
    """The figures of all runs as JSON."""
    return {
        "runs": [
            {
                "seconds": round(run.seconds),
                "peak_mb": run.peaks,
                "failed_answers": run.failed()[0],
                "failed_verdicts": run.failed()[1],
                "requests": server.questions[number],
                "met_a_fault": server.first_faults[number],
            }
            for number, run in enumerate(runs, start=1)
        ],
        "attempts": server.calls,
        "faults": dict(sorted(server.faults.items())),
    }
