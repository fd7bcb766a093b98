"""The order of verdicts and answers does not change a digit of a result."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from finished_runs import ANSWER, REFUSAL, make_run
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.metrics.paired import paired_difference
from vlm_unlearn.metrics.rates import mean_of_rates, mean_ratio, rate
from vlm_unlearn.store import EvaluationRun

SHUFFLES = 20


def shuffled(rows: Sequence[tuple[float, float, str]], seed: int) -> list[tuple[float, float, str]]:
    return random.Random(seed).sample(list(rows), len(rows))


@pytest.fixture(scope="module")
def rows() -> list[tuple[float, float, str]]:
    """Scores of two models, which floats cannot represent exactly, and their clusters."""
    generator = random.Random(0)
    return [(generator.randrange(11) / 10, generator.random(), f"group {i % 37}") for i in range(300)]


def test_rate_of_scores_does_not_depend_on_the_order(rows: list[tuple[float, float, str]]) -> None:
    results = set()
    for seed in range(SHUFFLES):
        values, _, clusters = zip(*shuffled(rows, seed), strict=True)
        results.add(rate(values, clusters).model_dump_json())
    assert len(results) == 1


def test_mean_ratio_does_not_depend_on_the_order(rows: list[tuple[float, float, str]]) -> None:
    results = set()
    for seed in range(SHUFFLES):
        terms = [(cluster, numerator, denominator) for numerator, denominator, cluster in shuffled(rows, seed)]
        results.add(mean_ratio([terms, terms[:0] + sorted(terms)]).model_dump_json())
    assert len(results) == 1


def test_paired_difference_does_not_depend_on_the_order(rows: list[tuple[float, float, str]]) -> None:
    results = set()
    for seed in range(SHUFFLES):
        base, model, clusters = zip(*shuffled(rows, seed), strict=True)
        results.add(paired_difference(base, model, clusters))
    assert len(results) == 1


def test_mean_of_rates_does_not_depend_on_the_order(rows: list[tuple[float, float, str]]) -> None:
    rates = [rate([value, other], ["a", "b"]) for value, other, _ in rows[:7]]
    assert len({mean_of_rates(random.Random(seed).sample(rates, 7)).model_dump_json() for seed in range(20)}) == 1


def test_summary_does_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    runs = {
        "base": make_run(tmp_path / "base", lambda prompt: ANSWER),
        "npo": make_run(tmp_path / "npo", lambda prompt: REFUSAL if hash(prompt.id[-3:]) % 2 else ANSWER),
    }
    summaries = set()
    for seed in range(4):
        for run in runs.values():
            for file in (EvaluationRun(run).responses_file, *run.glob("verdicts-*.jsonl")):
                lines = sorted(file.read_text().splitlines(keepends=True))
                file.write_text("".join(random.Random(seed).sample(lines, len(lines))))
        score_run(runs["npo"], saved_suite(runs["npo"]), "npo")
        compared = compare_runs(runs)[0]
        summaries.add((runs["npo"] / "summary.json").read_text() + json.dumps(compared.model_dump()))
    assert len(summaries) == 1
