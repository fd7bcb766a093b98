"""A sweep in one process: shared inputs, equal configurations, seeds, states, halves, chosen recipes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import raises_code
from helpers import recipe as tiny_recipe
from sweeps.sweep_scene import tiny_sweep
from trained import weights
from vlm_unlearn.config import Recipe, Suite, Sweep, load
from vlm_unlearn.errors import RunError
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.records import Rate
from vlm_unlearn.robustness.results import AttackResult, Recovery
from vlm_unlearn.store import EvaluationRun
from vlm_unlearn.sweeps import run_sweep
from vlm_unlearn.sweeps.measurement import Measurement
from vlm_unlearn.training.inputs import SharedInputs
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.runner import run_plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def scene(tiny_model: Path, training_sets: dict[str, Path], world: Path) -> Any:
    def make(space: dict[str, Any], **changes: Any) -> Sweep:
        return tiny_sweep(tiny_model, training_sets["safe_eraser"], world, space, **changes)

    return make


def test_sweep_reports_every_trial_and_its_front(scene: Any, tmp_path: Path) -> None:
    sweep = scene({"training.learning_rate": [1e-4, 3e-3], "method.beta": [0.1, 1.0]}, seeds=[0, 1])
    result = run_sweep(sweep, tmp_path / "out")
    assert [trial.state for trial in result.trials] == ["complete"] * 4
    assert len({json.dumps(trial.params) for trial in result.trials}) == 4
    assert all([seed.seed for seed in trial.seeds] == [0, 1] for trial in result.trials)
    assert set(result.front) <= {0, 1, 2, 3}
    assert set(result.choices) == {"knee", "best-asr", "best-degenerate_rate"}
    assert set(result.base) >= {"asr", "degenerate_rate"}
    for trial in result.trials:
        values = [seed.selection["asr"].value for seed in trial.seeds]
        assert trial.values["asr"] == pytest.approx(sum(values) / 2)
        assert set(trial.values) == {"asr", "degenerate_rate"}
    document = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [trial["number"] for trial in document["trials"]] == [0, 1, 2, 3]
    assert [trial["number"] for trial in result.to_json()["front"]] == result.front
    chosen = load(Recipe, tmp_path / "out" / "choices" / "knee.yaml")
    assert chosen.training.learning_rate == result.trial(result.choices["knee"]).params["training.learning_rate"]
    remaining = {folder.parts[-4] for folder in (tmp_path / "out" / "trials").glob("*/seed-*/run/model")}
    assert remaining == {result.trial(number).configuration for number in result.front}


def test_second_call_resumes_and_trains_nothing_again(
    scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = scene({"method.beta": [0.1, 0.2]})
    first = run_sweep(sweep, tmp_path / "out")
    monkeypatch.setattr("vlm_unlearn.sweeps.trials.run_plan", lambda *_, **__: pytest.fail("trains again"))
    assert run_sweep(sweep, tmp_path / "out") == first
    with raises_code("run-mismatch"):
        run_sweep(scene({"method.beta": [0.1, 0.3]}), tmp_path / "out")


def test_equal_configurations_are_trained_once(scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, evaluated = [], []
    train, measure = run_plan, Measurement.measure
    monkeypatch.setattr(
        "vlm_unlearn.sweeps.trials.run_plan",
        lambda planned, *rest, **keys: (trained.append(planned), train(planned, *rest, **keys))[1],
    )
    monkeypatch.setattr(
        Measurement, "measure", lambda self, model, *rest: (evaluated.append(model), measure(self, model, *rest))[1]
    )
    sweep = scene({"method.beta": [0.1, 0.2]}, sampler="random", trials=6)
    result = run_sweep(sweep, tmp_path / "out")
    assert [trial.state for trial in result.trials] == ["complete"] * 6
    assert len(trained) == 2
    assert len(evaluated) == 3  # with the base
    assert len({(trial.configuration, *trial.values.values()) for trial in result.trials}) == 2


@pytest.mark.parametrize("trainable", [{}, {"mode": "lora", "lora": {"r": 4}}, {"projector": "sine"}])
def test_shared_model_gives_the_weights_and_answers_of_separate_commands(
    scene: Any, tiny_model: Path, training_sets: dict[str, Path], world: Path, tmp_path: Path, trainable: Any
) -> None:
    space = {"training.learning_rate": [3e-3, 1e-3]}
    sweep = scene(space, overrides={"trainable": trainable}, keep_models="all")
    result = run_sweep(sweep, tmp_path / "out")
    suite = load(Suite, Path("suites/tiny"), values={"model": "m", **sweep.suite_overrides})
    for trial in result.trials:
        folder = tmp_path / "out" / "trials" / str(trial.configuration) / "seed-0"
        separate = load(Recipe, folder / "run" / "recipe.json").model_copy(update={"output": tmp_path / "separate"})
        separate = separate.model_copy(update={"output": tmp_path / f"separate-{trial.number}"})
        model = run_plan(plan(separate))
        if not trainable.get("mode"):
            shared, alone = weights(folder / "run" / "model"), weights(model)
            assert all(torch.equal(shared[name], alone[name]) for name in alone)
        evaluation = tmp_path / f"evaluation-{trial.number}"
        evaluate_run(suite.model_copy(update={"model": str(model)}), evaluation, "x")
        answers = [(answer.key, answer.text) for answer in EvaluationRun(evaluation).read_responses()]
        in_memory = EvaluationRun(folder / "evaluation").read_responses()
        assert [(answer.key, answer.text) for answer in in_memory] == answers


def test_shared_inputs_leave_the_loaded_model_unchanged(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    inputs = SharedInputs()
    models = []
    for number in range(2):
        recipe = tiny_recipe(tiny_model, training_sets["safe_eraser"], tmp_path / str(number), "npo")
        models.append(weights(run_plan(plan(recipe, inputs), inputs=inputs)))
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_halves_have_different_questions_and_equal_ones_for_all_splits(scene: Any) -> None:
    measurement = Measurement(scene({"method.beta": [0.1]}))
    first = measurement._first_half
    assert 0 < len(first) < len({(prompt.set, prompt.group_id) for prompt in measurement.prompts})
    plain = {group for split, group in first if split == "unsafe"}
    attacked = {group for split, group in first if split == "unsafe_what"}
    images = {prompt.group_id: prompt.image for prompt in measurement.prompts}
    assert {images[group] for group in plain} == {images[group] for group in attacked}


def test_aborted_trial_has_its_own_state(scene: Any, world: Path, tmp_path: Path) -> None:
    rule = {"degenerate_rate": {"at_least": 0.0}}
    probe = {"suite": "suites/tiny", "root": str(world), "num_questions": 1, "eval_steps": 1, "abort_when": rule}
    result = run_sweep(scene({"method.beta": [0.1]}, overrides={"probe": probe}), tmp_path / "out")
    (trial,) = result.trials
    assert (trial.state, trial.values, result.front) == ("aborted", {}, [])
    assert trial.error is not None


def test_diverged_trial_fails_and_the_others_complete(scene: Any, tmp_path: Path) -> None:
    space = {"training.learning_rate": [1e-3, 1e30]}
    result = run_sweep(scene(space, training={"max_steps": 4, "warmup_ratio": 0.0}), tmp_path / "out")
    assert [trial.state for trial in result.trials] == ["complete", "failed"]
    assert result.trials[1].error
    with pytest.raises(RunError) as caught:
        run_sweep(
            scene({"training.learning_rate": [1e30]}, training={"max_steps": 4, "warmup_ratio": 0.0}),
            tmp_path / "all-failed",
        )
    assert caught.value.code == "trials-failed"


def test_constraint_keeps_a_trial_off_the_front(scene: Any, tmp_path: Path) -> None:
    sweep = scene({"method.beta": [0.1]}, constraints={"refusal_rate": {"at_least": 1.0}})
    result = run_sweep(sweep, tmp_path / "out")
    assert [trial.feasible for trial in result.trials] == [False]
    assert (result.front, result.choices) == ([], {})


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_samplers_run_with_conditions_and_constraints_and_repeat_exactly(
    scene: Any, tmp_path: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measurement, "measure", lambda self, model, folder, *_: _made_up_rates(self, folder))
    space = {
        "recipe": ["tiny/npo", "tiny/po"],
        "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "method.beta": {"low": 0.1, "high": 1.0, "when": {"method": "npo"}},
    }
    monkeypatch.setattr("vlm_unlearn.sweeps.trials.TrialRunner._train", _no_training)
    keys = {"sampler": sampler, "trials": 14, "constraints": {"asr": {"at_most": 0.9}}}
    results = [run_sweep(scene(space, **keys), tmp_path / name) for name in ("first", "second")]
    params = [[trial.params for trial in result.trials] for result in results]
    assert params[0] == params[1]
    assert len(params[0]) == 14
    assert all(("method.beta" in values) == (values["recipe"] == "tiny/npo") for values in params[0])
    assert results[0].importance.keys() == {"asr", "degenerate_rate"}


def _no_training(self: Any, recipe: Recipe, trial: Any, measure: Any) -> None:
    from vlm_unlearn.store import RunDirectory

    run = RunDirectory(recipe.output)
    run.open({"kind": "train"})
    (recipe.output / "settings.json").write_text(json.dumps(recipe.training.learning_rate))


def _made_up_rates(measurement: Measurement, folder: Path) -> Any:
    from vlm_unlearn.metrics.rates import rate

    settings = folder.parent / "run" / "settings.json"
    value = min(1.0, 100 * json.loads(settings.read_text())) if settings.is_file() else 0.5
    rates = {name: rate([share], ["a"]) for name, share in (("asr", value), ("degenerate_rate", 1 - value))}
    return rates, rates


def test_unknown_metric_is_an_error_before_anything_is_written(scene: Any, tmp_path: Path) -> None:
    with raises_code("unknown-name", field="objectives.asr_atacked"):
        run_sweep(scene({"method.beta": [0.1]}, objectives={"asr_atacked": "min"}), tmp_path / "out")
    with raises_code("missing-setting", field="objectives.worst_recovery"):
        run_sweep(scene({"method.beta": [0.1]}, objectives={"worst_recovery": "min"}), tmp_path / "out")
    with raises_code("file-not-found"):
        run_sweep(scene({"method.beta": [0.1]}, suite_overrides={"root": str(tmp_path)}), tmp_path / "out")
    with raises_code("file-not-found"):
        run_sweep(scene({"method.beta": [0.1]}, overrides={"data": str(tmp_path / "none")}), tmp_path / "out")
    with raises_code("model-not-found"):
        run_sweep(scene({"method.beta": [0.1]}, overrides={"model": str(tmp_path / "none")}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_worst_recovery_of_attacks_is_an_objective(
    scene: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked: list[str] = []

    def run_robustness(suite: Any, model: str, base: str, out: Path, *rest: Any, **keys: Any) -> Any:
        attacked.append(model)
        assert (Path(model) / "model").is_dir()
        rate = Rate(value=0.5, low=0.4, high=0.6, n=10)
        attacks = [
            AttackResult(
                name=name,
                attack=name.partition("/")[0],
                asr=rate,
                asr_base=rate,
                recovered=Recovery(value=value, low=None, high=None, control="zero"),
                is_score=name.startswith("probe"),
            )
            for name, value in (("none", 0.9), ("relearn/10/5", 0.4), ("prefill", 0.2), ("probe/0", 0.8))
        ]
        return SimpleNamespace(attacks=attacks)

    monkeypatch.setattr("vlm_unlearn.sweeps.measurement.run_robustness", run_robustness)
    sweep = scene(
        {"method.beta": [0.1]},
        objectives={"worst_recovery": "min", "recovery:prefill": "min", "asr": "min"},
        robustness={"suite": "suites/tiny_robustness", "suite_overrides": {"root": str(world)}},
    )
    (trial,) = run_sweep(sweep, tmp_path / "out").trials
    assert len(attacked) == 1
    assert trial.values["worst_recovery"] == 0.4  # without the state without an attack, and without probes
    assert trial.values["recovery:prefill"] == 0.2
    assert trial.reported["recovery:relearn/10/5"] == 0.4


def test_probe_of_a_single_objective_prunes_trials_below_the_median(
    scene: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MadeUpProbe:
        """Rates the trials one worse than the other."""

        digest = "made up"
        calls = 0

        def __call__(self, model: Any) -> dict[str, float]:
            type(self).calls += 1
            return {"asr": min(1.0, type(self).calls / 20)}

    monkeypatch.setattr("vlm_unlearn.sweeps.trials.build_probe", lambda planned: MadeUpProbe())
    probe = {"suite": "suites/tiny", "root": str(world), "eval_steps": 1}
    sweep = scene(
        {"training.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}},
        objectives={"asr": "min"},
        sampler="random",
        trials=7,
        prune=True,
        overrides={"probe": probe},
    )
    result = run_sweep(sweep, tmp_path / "out")
    states = [trial.state for trial in result.trials]
    assert states[:5] == ["complete"] * 5  # the pruner has no median yet
    assert states[5:] == ["pruned"] * 2
    assert set(result.front) <= set(range(5))
