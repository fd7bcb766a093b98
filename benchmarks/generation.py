"""Answering in batches against answering one by one, with the demo's base model on 200 prompts of the tiny world.

    python benchmarks/generation.py

They take turns, several times, the model loaded and warm. Writes benchmarks/results/generation.json: seconds, the median of the
ratios, and how many answers differ. The base model is trained once (about 40 s) and cached.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "generation.json"
PROMPTS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()

    import torch

    from vlm_unlearn.config import GenerationConfig, Suite, load
    from vlm_unlearn.evaluation.prompts import image_roots, suite_prompts
    from vlm_unlearn.generation.base import spread
    from vlm_unlearn.generation.hf import answers
    from vlm_unlearn.models.loading import load_model, load_processor
    from vlm_unlearn.store import package_versions
    from vlm_unlearn.tiny_world.base_model import BaseConfig, base_model
    from vlm_unlearn.tiny_world.world import write_world

    base = base_model(BaseConfig())
    model, processor = load_model(base, "fp32").eval(), load_processor(base)
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        write_world(world, 0)
        suite = load(Suite, Path("suites/tiny"), [f"model={base}", f"root={world}"])
        prompts = spread(suite_prompts(suite), PROMPTS)

        def answered(batch_size: int) -> tuple[float, dict[str, str | None]]:
            config = suite.generation.model_copy(update={"batch_size": batch_size})
            started = time.perf_counter()
            batches = list(answers(model, processor, prompts, image_roots(suite), config))
            return time.perf_counter() - started, {response.prompt_id: response.text for batch in batches for response in batch}

        sizes = [suite.generation.batch_size, GenerationConfig().batch_size, 1]  # the demo's, the default, one by one
        answered(sizes[0])  # warm
        rows = []
        flips = dict.fromkeys(sizes[:-1], 0)
        for number in range(options.repetitions):
            found = {size: answered(size) for size in (sizes if number % 2 else sizes[::-1])}  # neither always goes first
            for size in flips:
                flips[size] = max(flips[size], sum(found[size][1][id] != text for id, text in found[1][1].items()))
            rows.append({f"batches_of_{size}_s": round(found[size][0], 3) for size in sizes})
            print(rows[-1], flush=True)
    ratios = {size: statistics.median(row["batches_of_1_s"] / row[f"batches_of_{size}_s"] for row in rows) for size in flips}
    result = {
        "prompts": len(prompts),
        "max_new_tokens": suite.generation.max_new_tokens,
        "times_faster_than_one_by_one": {size: round(ratio, 1) for size, ratio in ratios.items()},
        "answers_that_differ": flips,
        "rows": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": package_versions(),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(f"times faster: {result['times_faster_than_one_by_one']}; answers that differ: {flips}; written: {RESULTS}")


if __name__ == "__main__":
    main()
