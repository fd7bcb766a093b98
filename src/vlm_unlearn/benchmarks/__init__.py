"""Utility benchmarks, one file each: official files in, questions for a model and a score per answer out."""

from vlm_unlearn.benchmarks import gqa, mmbench, mmvet, pope, scienceqa, textvqa, vizwiz, vqav2
from vlm_unlearn.benchmarks.base import (
    BENCHMARKS,
    AnswersNotPublicError,
    Benchmark,
    BenchmarkScores,
    Prediction,
    QuestionScore,
    get_benchmark,
)
from vlm_unlearn.benchmarks.prompts import benchmark_image_root, benchmark_prompts
from vlm_unlearn.benchmarks.scoring import load_truths, read_predictions, score_file, score_predictions

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "AnswersNotPublicError",
    "Prediction",
    "QuestionScore",
    "BenchmarkScores",
    "benchmark_image_root",
    "benchmark_prompts",
    "get_benchmark",
    "load_truths",
    "read_predictions",
    "score_file",
    "score_predictions",
]
_registered = (gqa, mmbench, mmvet, pope, scienceqa, textvqa, vizwiz, vqav2)
