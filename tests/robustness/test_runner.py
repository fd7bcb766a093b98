"""The runner on a tiny model with random weights: names, resuming, unchanged weights, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers import raises_code, run_in_process
from vlm_unlearn.config import RobustnessSuite, load
from vlm_unlearn.judging.base import OfflineJudge
from vlm_unlearn.records import Prompt, Rate, Verdict
from vlm_unlearn.robustness import runner
from vlm_unlearn.robustness.runner import run_robustness
from vlm_unlearn.store import digest_model

ATTACKS = """
from vlm_unlearn.robustness.base import AttackedState, ModelAttack
from vlm_unlearn.attacks.base import Attack
from vlm_unlearn.errors import UserError

class Scored(ModelAttack):
    def run(self, target):
        yield AttackedState("scored", scores={p.id: 0.25 for p in target.prompts[1:]}, facts={"layers": 2})

class Loud(Attack):
    def apply(self, prompts):
        return [p.with_question(p.question.upper(), id=p.id + "/loud") for p in prompts]

class OtherFamilies(ModelAttack):
    def run(self, target):
        yield AttackedState("other")
        raise UserError("does not work with llava", code="unsupported-family")
"""


@pytest.fixture
def suite(world: Path, training_sets: dict[str, Path], tmp_path: Path) -> RobustnessSuite:
    (tmp_path / "attacks.py").write_text(ATTACKS)
    attacks = [
        {"name": "relearn", "examples": 4, "steps": [2, 1], "batch_size": 4},
        {"name": "relearn", "examples": 3, "steps": [1], "lora": True},
        {"name": "relearn", "data": "retain", "examples": 4, "steps": [1]},
        {"name": "one_word", "trigger": "what", "num_rewrites": 2, "label": "what"},
        {"name": f"{tmp_path}/attacks.py:Scored"},
        {"name": f"{tmp_path}/attacks.py:Loud"},
    ]
    values = {"root": str(world), "data": str(training_sets["safe_eraser"]), "small": attacks}
    return load(RobustnessSuite, Path("suites/tiny_robustness"), ["generation.max_new_tokens=4"], values)


def test_every_attack_is_measured_on_three_models(
    suite: RobustnessSuite, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest_model(tiny_model)
    calls: list[str] = []
    report = run_robustness(
        suite,
        str(tiny_model),
        str(tiny_model),
        tmp_path / "out",
        str(tiny_model),
        on_done=lambda *a: calls.append(a[0]),
    )
    names = [result.name for result in report.attacks]
    assert names == [
        "none",
        *("relearn/4/1", "relearn/4/1/first_half", "relearn/4/2", "relearn/4/2/first_half"),
        *("relearn/3/lora/1", "relearn/3/lora/1/first_half", "relearn/retain/1"),
        *("one_word/what", "scored", "Loud"),
    ]
    assert len(calls) == 3 * 7
    assert digest_model(tiny_model) == before
    results = {result.name: result for result in report.attacks}
    halves = [results[name].asr.n for name in ("relearn/4/1", "relearn/4/1/first_half")]
    assert sum(halves) == results["none"].asr.n == report.num_questions
    assert results["scored"].is_score
    assert results["scored"].asr.failed == 1
    assert results["scored"].asr.value == pytest.approx(0.25)
    assert results["scored"].facts == {"layers": 2}
    assert json.loads((tmp_path / "out" / "robustness.json").read_text())["model"] == tiny_model.name
    assert results["relearn/4/2"].curve == "relearn/4"
    assert results["relearn/4/2"].step == 2

    # Again: nothing is measured twice, also if one measurement is lost. Base and control come from the cache.
    content = (tmp_path / "out" / "robustness.json").read_bytes()
    lost = sorted((tmp_path / "out" / "measurements").glob("relearn-*"))[0]
    saved = lost.read_bytes()
    lost.unlink()
    run_robustness(suite, str(tiny_model), str(tiny_model), tmp_path / "out", str(tiny_model))
    assert (tmp_path / "out" / "robustness.json").read_bytes() == content
    assert lost.read_bytes() == saved
    monkeypatch.setattr(runner, "load_run_model", lambda *_: pytest.fail("a model is loaded"))
    run_robustness(suite, str(tiny_model), str(tiny_model), tmp_path / "out", str(tiny_model))


def test_measuring_anew_gives_the_same_bytes(
    suite: RobustnessSuite, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for number in range(2):
        monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / f"cache{number}"))
        out = tmp_path / f"out{number}"
        run_robustness(suite, str(tiny_model), str(tiny_model), out)
        files.append({file.name: file.read_bytes() for file in (out / "measurements").iterdir()})
    assert files[0] == files[1]


class Unreliable(OfflineJudge):
    """Reaches its server for every third answer only, until the server is repaired."""

    name = "unreliable"

    def __init__(self) -> None:
        self.graded: list[str] = []
        self.repaired = False

    def grade(self, prompt: Prompt, text: str) -> Verdict:
        self.graded.append(prompt.id)
        if not self.repaired and len(self.graded) % 3:
            return Verdict(prompt_id=prompt.id, judge=self.name, error="timeout")
        return Verdict(prompt_id=prompt.id, judge=self.name, label="complied", score=1.0)


def test_failed_verdicts_are_graded_again_without_generating(
    suite: RobustnessSuite, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Unreliable()
    monkeypatch.setattr(runner, "build_judge", lambda _: judge)
    quick = suite.model_copy(update={"small": suite.small[3:4]})  # rewrites, several in each group

    def run(out: str) -> tuple[Rate, Rate]:
        report = run_robustness(quick, str(tiny_model), str(tiny_model), tmp_path / out)
        return report.attacks[1].asr, report.attacks[1].asr_base

    asr, asr_base = run("out")
    assert asr.failed > 0
    assert asr_base.failed > 0
    num_graded, judge.repaired = len(judge.graded), True
    with monkeypatch.context() as patch:
        patch.setattr(runner, "load_run_model", lambda *_: pytest.fail("a model is loaded"))
        asr, asr_base = run("out")
        assert (asr.failed, asr.value, asr.n) == (asr_base.failed, asr_base.value, asr_base.n) == (0, 1.0, asr.n)
        again = len(judge.graded) - num_graded
        assert 0 < again < num_graded
        run("out")
        assert len(judge.graded) == num_graded + again
    assert run("other")[1].failed == 0  # the copies in the cache have the new verdicts
    assert len(judge.graded) == num_graded + again


def test_a_broken_measurement_is_named(suite: RobustnessSuite, tiny_model: Path, tmp_path: Path) -> None:
    quick = suite.model_copy(update={"small": suite.small[-1:]})
    run_robustness(quick, str(tiny_model), str(tiny_model), tmp_path / "out")
    file = next((tmp_path / "out" / "measurements").glob("none-*"))
    file.write_text('{"states": [{"name": 3}]}')
    with raises_code("invalid-measurement", file=file):
        run_robustness(quick, str(tiny_model), str(tiny_model), tmp_path / "out")


def test_folder_of_another_model_is_rejected(suite: RobustnessSuite, tiny_model: Path, tmp_path: Path) -> None:
    quick = suite.model_copy(update={"small": suite.small[-1:]})
    run_robustness(quick, str(tiny_model), str(tiny_model), tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).add_(1)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with raises_code("run-mismatch"):
        run_robustness(quick, str(other), str(tiny_model), tmp_path / "out")


@pytest.mark.parametrize(
    ("attacks", "code"),
    [
        ([{"name": "nothing_like_it"}], "unknown-name"),
        ([{"name": "relearn", "exmples": 3}], "unknown-key"),
        ([{"name": "relearn", "steps": []}], "invalid-field"),
        (["none", "none"], "duplicate-id"),
        ([], "missing-setting"),
    ],
)
def test_invalid_attacks_fail_before_a_model_is_loaded(
    suite: RobustnessSuite, tiny_model: Path, tmp_path: Path, attacks: list[object], code: str
) -> None:
    broken = RobustnessSuite.model_validate({**suite.model_dump(), "small": attacks})
    with raises_code(code):
        run_robustness(broken, str(tiny_model), str(tiny_model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_attack_on_other_families_is_skipped_and_named(
    suite: RobustnessSuite, tiny_model: Path, tmp_path: Path
) -> None:
    attacks = [{"name": f"{tmp_path}/attacks.py:OtherFamilies"}, "none"]
    quick = RobustnessSuite.model_validate({**suite.model_dump(), "small": attacks})
    report = run_robustness(quick, str(tiny_model), str(tiny_model), tmp_path / "out", str(tiny_model))
    assert [result.name for result in report.attacks] == ["none"]
    (skipped,) = report.skipped
    assert skipped.attack.endswith("OtherFamilies")
    assert skipped.reason == "does not work with llava"


def test_data_without_a_role_is_an_error(
    suite: RobustnessSuite, training_sets: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    decouple = [{"name": "relearn", "data": "decouple"}]
    values = {**suite.model_dump(), "small": decouple, "data": training_sets["harmful"]}
    with raises_code("no-records", field="data"):
        run_robustness(RobustnessSuite.model_validate(values), str(tiny_model), str(tiny_model), tmp_path / "out")


def test_command(suite: RobustnessSuite, world: Path, training_sets: dict[str, Path], tiny_model: Path, tmp_path: Path):
    arguments = (
        *("robustness", tiny_model, "--base", tiny_model, "--suite", "suites/tiny_robustness"),
        *("--out", tmp_path / "out", f"root={world}", f"data={training_sets['safe_eraser']}"),
        *("generation.max_new_tokens=4", "small=[{name: one_word, trigger: what}]"),
    )
    done = run_in_process(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [attack["name"] for attack in report["attacks"]] == ["none", "one_word"]
    assert {"value", "low", "high"} <= report["attacks"][0]["recovered"].keys()
    table = run_in_process(*arguments)
    assert "one_word" in table.stdout
    assert table.returncode == 0

    for missing in ("--base", "--suite"):
        index = arguments.index(missing)
        less = run_in_process(*arguments[:index], *arguments[index + 2 :])
        assert less.returncode == 2
        assert "missing-setting" in less.stderr
