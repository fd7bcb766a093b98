"""The Pareto front, the knee, and the hypervolume, compared with Optuna's."""

from __future__ import annotations

import random

import numpy as np
import pytest
from optuna._hypervolume import compute_hypervolume

from vlm_unlearn.sweeps.front import choose, hypervolume, hypervolumes, knee, pareto_front
from vlm_unlearn.sweeps.records import State, Trial

TWO = {"asr": "min", "utility": "max"}


def trial(number: int, asr: float, utility: float, state: State = "complete", feasible: bool = True) -> Trial:
    values = {"asr": asr, "utility": utility} if state == "complete" else {}
    return Trial(number=number, params={}, state=state, values=values, feasible=feasible, configuration=str(number))


def test_front_has_the_trials_that_no_other_dominates() -> None:
    trials = [
        trial(0, 0.5, 0.9),
        trial(1, 0.2, 0.8),
        trial(2, 0.2, 0.7),  # dominated by 1
        trial(3, 0.0, 0.3),
        trial(4, 0.0, 1.0, feasible=False),
        trial(5, 0.0, 0.0, state="aborted"),
        trial(6, 0.5, 0.9).model_copy(update={"configuration": "0"}),  # a copy of 0
        trial(7, 0.5, 0.9),  # as good as 0 with other settings
    ]
    front = pareto_front(trials, TWO)
    assert [point.number for point in front] == [3, 1, 0, 7]
    assert knee(front, TWO) == trials[1]
    chosen = {name: point.number for name, point in choose(trials, TWO).items()}
    assert chosen == {"knee": 1, "best-asr": 3, "best-utility": 0}


def test_front_of_nothing_is_empty() -> None:
    assert pareto_front([], TWO) == []
    assert knee([], TWO) is None
    assert choose([trial(0, 0, 0, "failed")], TWO) == {}
    assert hypervolumes([trial(0, 0, 0, "failed")], TWO) == [0.0]


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_hypervolume_equals_that_of_optuna(dimensions: int) -> None:
    rng = random.Random(dimensions)
    for _ in range(20):
        points = [tuple(rng.choice((rng.random(), 0.5)) for _ in range(dimensions)) for _ in range(rng.randint(1, 8))]
        reference = (1.0,) * dimensions
        expected = compute_hypervolume(np.array(points), np.array(reference))
        assert hypervolume(points, reference) == pytest.approx(expected, abs=1e-12)


def test_hypervolume_grows_with_the_trials() -> None:
    trials = [trial(0, 0.5, 0.5), trial(1, 0.9, 0.1), trial(2, 0, 0, "failed"), trial(3, 0.0, 1.0)]
    assert hypervolumes(trials, TWO) == pytest.approx([0.25, 0.25, 0.25, 1.0])
