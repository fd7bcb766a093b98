"""The charts of a sweep: fronts for each pair of objectives, parallel coordinates, and names that are only text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pytest

from vlm_unlearn.config import Sweep, validate
from vlm_unlearn.records import Rate
from vlm_unlearn.reporting.charts.chart import Front, Parallel, hover_texts
from vlm_unlearn.reporting.charts.inline_svg import inline_svg
from vlm_unlearn.reporting.charts.matplotlib_charts import SETTINGS, draw_chart, write_plots
from vlm_unlearn.reporting.sweeps.charts import sweep_charts
from vlm_unlearn.sweeps.records import SeedResult, SweepResult, Trial

EVIL = "<script>alert(1)</script> $x^2$"


def seed_result(seed: int, values: dict[str, float]) -> SeedResult:
    rates = {name: Rate(value=value, low=value, high=value, n=10) for name, value in values.items()}
    return SeedResult(seed=seed, selection=rates, reported=rates)


def scene() -> tuple[Sweep, SweepResult]:
    keys: dict[str, Any] = {
        "recipe": "tiny/npo",
        "suite": "suites/tiny",
        "sampler": "random",
        "trials": 4,
        "space": {
            "method": ["npo", EVIL],
            "training.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
            "method.beta": {"low": 0.1, "high": 0.5, "when": {"method": "npo"}},
        },
        "objectives": {"asr": "min", "utility": "max", "sarr": "min"},
    }
    sweep = validate(Sweep, keys, "sweep.yaml")
    trials = []
    for number, (method, asr) in enumerate((("npo", 0.1), (EVIL, 0.0), ("npo", 0.5))):
        values = {"asr": asr, "utility": 0.5 + asr, "sarr": 0.2}
        params = {"method": method, "training.learning_rate": 10.0 ** (number - 5)}
        params |= {"method.beta": 0.2} if method == "npo" else {}
        seeds = [seed_result(0, values), seed_result(1, {**values, "asr": asr + 0.1})]
        trials.append(
            Trial(
                number=number,
                params=params,
                state="complete",
                values=values,
                reported=values,
                seeds=seeds,
                feasible=number < 2,
                configuration=str(number),
            )
        )
    trials.append(Trial(number=3, params={"method": "npo"}, state="failed", error="diverged"))
    result = SweepResult(
        name="s",
        objectives=sweep.objectives,
        trials=trials,
        front=[1, 0],
        base={"asr": 1.0, "utility": 1.0, "sarr": 0.0},
        hypervolume=[0.1, 0.3, 0.3, 0.3],
        importance={"asr": {"method": 0.7, "training.learning_rate": 0.3}},
    )
    return sweep, result


def test_each_pair_of_objectives_has_a_front_with_the_base_and_the_single_models() -> None:
    charts = sweep_charts(*scene())
    assert set(charts) == {"pareto-1", "pareto-2", "pareto-3", "parallel", "importance", "hypervolume"}
    front = charts["pareto-1"]
    assert isinstance(front, Front)
    assert [point.kind for point in front.points] == ["base", "front", "front", "outside"]
    assert (front.points[1].x, front.points[1].y) == (10.0, 60.0)
    assert front.points[1].seeds == [(10.0, 60.0), (20.0, 60.0)]
    assert len(hover_texts(front)) == 4


def test_parallel_coordinates_place_choices_and_logarithms() -> None:
    parallel = sweep_charts(*scene())["parallel"]
    assert isinstance(parallel, Parallel)
    axes = {axis.name: list(axis.positions) for axis in parallel.axes}
    assert axes["method"] == [0.0, 1.0, 0.0]
    assert axes["training.learning_rate"] == pytest.approx([0.0, 0.5, 1.0])
    assert axes["method.beta"] == [0.5, None, 0.5]
    assert axes["asr, %"] == pytest.approx([0.2, 0.0, 1.0])
    assert list(parallel.highlighted) == [True, True, False]


def test_charts_are_drawn_and_names_stay_text(tmp_path: Path) -> None:
    charts = sweep_charts(*scene())
    write_plots(tmp_path, charts)
    for name, chart in charts.items():
        page = inline_svg((tmp_path / f"{name}.svg").read_text("utf-8"), name, chart)
        assert "<script" not in page
        with matplotlib.rc_context(dict(SETTINGS)):
            assert draw_chart(chart)


def test_sweep_without_a_complete_trial_has_no_charts() -> None:
    sweep, result = scene()
    assert sweep_charts(sweep, result.model_copy(update={"trials": result.trials[3:]})) == {}
