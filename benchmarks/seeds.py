"""Prints the table of docs/methods.md: the rates of each method in the tiny world over several seeds of `demo --full`.

    for seed in 0 1 2; do vlm-unlearn demo --full --seed $seed --out full$seed; done
    python benchmarks/seeds.py full0 full1 full2

Rates are the lowest and the highest of the seeds in percent. The seconds are the median of the training runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed import markdown

from vlm_unlearn.store import read_json
from vlm_unlearn.worlds.tiny.demo import training_folder

METRICS = {
    "ASR attacked": "asr_attacked",
    "SARR": "sarr",
    "degenerate": "degenerate_rate",
    "utility": "utility",
    "utility attacked": "utility_attacked",
}
NAMES = {
    "mixed_sft diversified": "`mixed_sft` on diversified questions",
    "npo+refusal+pd": "`npo` + late refusals + pd",
}


def display_name(model: str) -> str:
    name, _, decoupled = model.partition("+")
    return NAMES.get(model, f"`{name}`" + (" + pd" if decoupled else ""))


def format_range(values: Sequence[float]) -> str:
    lowest, highest = (round(100 * value) for value in (min(values), max(values)))
    return f"{lowest}" if lowest == highest else f"{lowest}–{highest}"


def seconds(folders: Sequence[Path], model: str) -> str:
    """Returns the median time of the training runs, nothing for the base model."""
    if model == "base":
        return ""
    manifests = [training_folder(folder, model) / "manifest.json" for folder in folders]
    return f"{statistics.median(read_json(manifest)['wall_seconds'] for manifest in manifests):.1f}"


def table(folders: Sequence[Path]) -> str:
    summaries = [read_json(folder / "summary.json")["rows"] for folder in folders]
    seeds: list[dict[str, Any]] = [{row["model"]: row["metrics"] for row in rows} for rows in summaries]
    lines = []
    for model in seeds[0]:
        rates = [format_range([metrics[model][metric]["value"] for metrics in seeds]) for metric in METRICS.values()]
        lines.append([display_name(model), *rates, seconds(folders, model)])
    return markdown(["method", *METRICS, "seconds"], lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of `demo --full`, one per seed")
    print(table(parser.parse_args().folders))
