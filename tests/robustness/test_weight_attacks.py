"""Attacks on weights leave the models of a run as they are, and a killed run resumes with the same results."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from attack_targets import tiny_suite
from fork_server import ForkedProcess
from vlm_unlearn.config import ModelAttackConfig, RobustnessSuite
from vlm_unlearn.modeling.loader import load_model
from vlm_unlearn.robustness.runner import run_robustness
from vlm_unlearn.store import RunDirectory, digest_model, write_json

ATTACKS = [
    {"name": "quantize", "group_size": 32},
    {"name": "restore", "parts": ["projector", "layers"], "mix": [0.5]},
    {"name": "prune", "sparsities": [0.5]},
    {"name": "prune", "criterion": "wanda", "sparsities": [0.5], "calibration_examples": 8},
    {"name": "ablate", "positions": 1, "num_questions": 4},
]
# An attack that kills its process once, while a state of `quantize` is in effect and not all states are measured.
KILLING = """
import os
import signal
from pathlib import Path

from vlm_unlearn.config import Strict
from vlm_unlearn.robustness.base import AttackedState, ModelAttack
from vlm_unlearn.robustness.quantize import Quantize


class Options(Strict):
    marker: Path


class Killing(ModelAttack):
    options_type = Options
    changes_weights = True
    uses_base = True

    def run(self, target):
        for number, state in enumerate(Quantize().run(target)):
            yield AttackedState(state.name.replace("quantize", "killing"), facts=state.facts)
            if number == 1 and not self.options.marker.exists():
                self.options.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
"""
RUN = """
import sys
from pathlib import Path

from vlm_unlearn.config import RobustnessSuite
from vlm_unlearn.robustness.runner import run_robustness
from vlm_unlearn.store import read_json

suite, model, base, out = sys.argv[1:]
run_robustness(RobustnessSuite.model_validate(read_json(Path(suite))), model, base, out)
"""


@pytest.fixture
def suite(training_sets: dict[str, Path], world: Path) -> RobustnessSuite:
    attacks = [ModelAttackConfig.model_validate(attack) for attack in ATTACKS]
    changes = {"data": training_sets["safe_eraser"], "num_questions": 3, "small": attacks}
    return tiny_suite(world).model_copy(update=changes)


@pytest.fixture
def run_folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A training run whose model differs from its base."""
    run = RunDirectory(tmp_path / "run")
    run.open({"kind": "train"})
    shutil.copytree(tiny_model, run.model)
    model = load_model(tiny_model, "fp32")
    for parameter in model.parameters():
        parameter.data *= 1.01
    model.save_pretrained(run.model)
    return run.path


@pytest.mark.slow
def test_no_attack_changes_the_files_of_the_run_or_its_base(
    suite: RobustnessSuite, run_folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    digests = digest_model(run_folder / "model"), digest_model(tiny_model)
    report = run_robustness(suite, str(run_folder), str(tiny_model), tmp_path / "out")
    assert (digest_model(run_folder / "model"), digest_model(tiny_model)) == digests
    assert [result.name for result in report.attacks] == [
        *("none", "quantize/int8", "quantize/int4", "quantize/nf4"),
        *("restore/projector", "restore/layers_0", "restore/layers_1", "restore/mix/0.5"),
        *("prune/0.5", "prune/wanda/0.5", "ablate/direction", "ablate/random"),
    ]
    assert all(result.asr.failed == 0 and result.asr.n for result in report.attacks)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(180)
def test_a_run_that_was_killed_during_an_attack_resumes_with_the_same_results(
    suite: RobustnessSuite, run_folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, program, settings = tmp_path / "killing.py", tmp_path / "program.py", tmp_path / "suite.json"
    plugin.write_text(KILLING)
    program.write_text(RUN)
    killing = ModelAttackConfig(name=f"{plugin}:Killing", marker=str(tmp_path / "killed"))  # type: ignore[call-arg]
    suite = suite.model_copy(update={"small": [suite.small[0], killing, suite.small[2]]})
    write_json(settings, suite.model_dump(mode="json"))

    def run(out: Path) -> int:
        monkeypatch.setenv("VLM_UNLEARN_CACHE", f"{out}-cache")  # where measurements of base models are shared
        return ForkedProcess([settings, run_folder, tiny_model, out], program=program).wait(timeout=150)

    digest = digest_model(run_folder / "model")
    resumed, complete = tmp_path / "resumed", tmp_path / "complete"
    assert run(resumed) == -signal.SIGKILL
    assert not (resumed / "robustness.json").exists()
    finished = {file.name: file.stat().st_mtime_ns for file in (resumed / "measurements").iterdir()}
    assert len(finished) == 2  # no attack and quantize, on the base model
    assert run(resumed) == 0
    assert all((resumed / "measurements" / name).stat().st_mtime_ns == stamp for name, stamp in finished.items())
    assert run(complete) == 0
    assert (resumed / "robustness.json").read_bytes() == (complete / "robustness.json").read_bytes()
    assert digest_model(run_folder / "model") == digest
