"""Utility benchmarks, one module each, with the name of the benchmark.

A benchmark reads official files, returns questions and scores answers.
"""

from vlm_unlearn.benchmarks.base import (
    BENCHMARKS,
    AnswersNotPublicError,
    Benchmark,
    BenchmarkScores,
    Prediction,
    QuestionScore,
    get_benchmark,
    same_question,
)
from vlm_unlearn.benchmarks.prompts import benchmark_image_root, benchmark_prompts
from vlm_unlearn.benchmarks.scoring import load_truths, read_predictions, score_file, score_predictions

__all__ = [
    "BENCHMARKS",
    "AnswersNotPublicError",
    "Benchmark",
    "BenchmarkScores",
    "Prediction",
    "QuestionScore",
    "benchmark_image_root",
    "benchmark_prompts",
    "get_benchmark",
    "load_truths",
    "read_predictions",
    "same_question",
    "score_file",
    "score_predictions",
]
