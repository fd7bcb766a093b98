"""Speed and memory of judging with a server on this machine, and a check that a second run sends no requests.

    python benchmarks/judging.py

Starts a server that answers at once in a separate process, judges run folders with 2,500 and 10,000 answers with
`vlm-unlearn judge run` at concurrency 32, each twice, and writes benchmarks/results/judging.json.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "judging.json"
TESTS = Path(__file__).parents[1] / "tests"
CONCURRENCY = 32


def serve() -> None:
    """Answers until it is killed. Prints its address, and the number of requests after each line on standard input."""
    sys.path.insert(0, str(TESTS))
    from stub_server import stub_server

    with stub_server(lambda text: "It says what is asked for.\nVerdict: COMPLIED") as stub:
        print(stub.url, flush=True)
        for _ in sys.stdin:
            print(stub.calls, flush=True)
            stub.bodies.clear()


def make_run(folder: Path, count: int) -> None:
    """Writes a finished run folder with `count` answers."""
    from vlm_unlearn.config import Suite
    from vlm_unlearn.records import Prompt, Response
    from vlm_unlearn.store import EvaluationRun, write_json, write_records

    case = {"name": "unsafe", "format": "vlguard", "file": "x.json", "images": ".", "kind": "unsafe"}
    run = EvaluationRun(folder)
    run.open({})
    run.record_cost(0.0, finished=True)
    write_json(run.suite_file, Suite.model_validate({"model": "m", "splits": [case]}).model_dump(mode="json"))
    ids = [f"p{number}" for number in range(count)]
    write_records(
        run.prompts_file,
        (Prompt(id=id, group_id=id, set="unsafe", kind="unsafe", question=f"Question {id}?") for id in ids),
    )
    write_records(
        run.responses_file,
        (Response(prompt_id=id, text=f"This is answer {id} of {count} to it.") for id in ids),
    )


def judge(folder: Path, url: str) -> tuple[float, float]:
    """Returns the seconds and the peak memory in MiB of one `judge run`, including its start-up."""
    arguments = [
        "judge",
        "run",
        str(folder),
        "name=llm",
        "rubric=four_labels",
        "model=stub",
        f"server={url}",
        f"concurrency={CONCURRENCY}",
    ]
    code = "import sys; sys.argv[0] = 'vlm-unlearn'\nfrom vlm_unlearn.cli.main import main\nimport atexit\n"
    code += (
        "from vlm_unlearn.store import peak_memory_mb\natexit.register(lambda: print('peak', peak_memory_mb()))\nmain()"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    peak = re.search(r"peak (\d+)", done.stdout)
    assert peak is not None
    return time.monotonic() - started, float(peak.group(1))


def main() -> None:
    rows = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(
            [sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        os.environ["VLM_UNLEARN_CACHE"] = scratch

        def calls() -> int:
            server.stdin.write("\n")  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            return int(server.stdout.readline())  # type: ignore[union-attr]

        previous_calls = 0
        for count in (2_500, 10_000):
            folder = Path(scratch) / str(count)
            make_run(folder, count)
            for name in ("first", "from the cache"):
                if name != "first":
                    next(folder.glob("verdicts-*.jsonl")).unlink()  # the responses stay in the cache
                seconds, peak = judge(folder, url)
                total_calls = calls()
                new_calls, previous_calls = total_calls - previous_calls, total_calls
                rows.append(
                    {"verdicts": count, "run": name, "seconds": round(seconds, 1), "calls": new_calls, "peak_mb": peak}
                )
                print(f"{count:>6} verdicts, {name:<15}{seconds:>6.1f} s, {new_calls:>6} calls, peak {peak:.0f} MB")
        server.terminate()
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    RESULTS.write_text(json.dumps({"concurrency": CONCURRENCY, "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    serve() if sys.argv[1:2] == ["serve"] else main()
