"""Utility benchmarks, one file each: official annotations and a model's answers in, a score per question out."""

from vlm_unlearn.benchmarks import gqa, mmbench, pope, scienceqa, textvqa, vizwiz, vqav2
from vlm_unlearn.benchmarks.base import BENCHMARKS, Benchmark, Scored, Scores, read_predictions, score

__all__ = ["BENCHMARKS", "Benchmark", "Scored", "Scores", "read_predictions", "score"]
_registered = (gqa, mmbench, pope, scienceqa, textvqa, vizwiz, vqav2)
