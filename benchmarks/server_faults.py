"""Evaluates a model and a judge on a server with 30 % faults, three times in the same folder.

Every prompt must get an answer or a failure with its reason, every answer a verdict or such a failure, no run may lose
a record, and memory must stay flat although answers of 50 MB and compressed ones of 200 MB are among the faults.

    python benchmarks/server_faults.py [--count 300] [--seed 0] [--out benchmarks/results/server_faults.json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "server_faults.json")
    arguments = parser.parse_args()
    from fault_server import fault_server
    from faulty_evaluation import FaultyEvaluation, Finished, answer, check_runs, figures

    with tempfile.TemporaryDirectory() as folder, fault_server(answer, seed=arguments.seed) as server:
        os.environ["VLM_UNLEARN_CACHE"] = f"{folder}/cache"
        (Path(folder) / "evaluation").mkdir()
        evaluation = FaultyEvaluation(Path(folder) / "evaluation", server, arguments.count, forked=False)
        runs: list[Finished] = []
        for number in range(1, 4):
            runs.append(evaluation.repeat(["evaluate", evaluation.suite, "--out", evaluation.run.path]))
            print(f"run {number}: {runs[-1].seconds:.0f} s, peaks {runs[-1].peaks}, failed {runs[-1].failed()}")
            print(runs[-1].notes)
    check_runs(runs, limit=1000, growth=50)
    document = {"prompts": arguments.count, "seed": arguments.seed, **figures(runs, server)}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
