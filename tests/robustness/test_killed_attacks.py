"""A run that is killed in the middle of each of its attacks has the results of a run that was not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from attack_targets import tiny_suite
from fork_server import ForkedProcess
from vlm_unlearn.config import ModelAttackConfig
from vlm_unlearn.store import digest_model, write_json

# Each attack measures several states. The model is killed while the first one is in effect.
ATTACKS = [
    {"name": "prefill", "reference": [1, 2]},
    {"name": "in_context", "k": [1, 2]},
    {"name": "image_noise", "std": [10, 40]},
    {"name": "relearn", "examples": 4, "steps": [1, 2]},
    {"name": "quantize", "group_size": 32},
    {"name": "restore", "parts": ["projector", "layers"], "mix": [0.5]},
    {"name": "prune", "sparsities": [0.3, 0.5]},
    {"name": "ablate", "positions": 1, "num_questions": 4},
    {"name": "pgd", "steps": 2, "universal_steps": 2},
    {"name": "soft_prompt", "steps": [1, 2]},
    {"name": "probe"},
]
KILLING = """
import os
import signal
from pathlib import Path
from typing import Any

from vlm_unlearn.config import ModelAttackConfig, Strict
from vlm_unlearn.robustness.base import ModelAttack, build_model_attack


class Options(Strict):
    attack: dict[str, Any]
    marker: Path


class Killing(ModelAttack):
    options_type = Options
    changes_weights = True
    uses_base = True

    def run(self, target):
        for state in build_model_attack(ModelAttackConfig.model_validate(self.options.attack)).run(target):
            yield state
            if not self.options.marker.exists():
                self.options.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
"""
RUN = """
import sys
from pathlib import Path

from vlm_unlearn.config import RobustnessSuite
from vlm_unlearn.robustness.runner import run_robustness
from vlm_unlearn.store import read_json

suite, model, out = sys.argv[1:]
run_robustness(RobustnessSuite.model_validate(read_json(Path(suite))), model, model, out)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(400)
def test_a_run_that_is_killed_during_each_attack_has_the_same_results(
    world: Path, training_sets: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, program, settings = tmp_path / "killing.py", tmp_path / "program.py", tmp_path / "suite.json"
    plugin.write_text(KILLING)
    program.write_text(RUN)
    markers = [tmp_path / f"killed-{number}" for number in range(len(ATTACKS))]
    attacks = [
        ModelAttackConfig.model_validate({"name": f"{plugin}:Killing", "attack": attack, "marker": str(marker)})
        for attack, marker in zip(ATTACKS, markers, strict=True)
    ]
    changes = {"data": training_sets["safe_eraser"], "num_questions": 4, "small": attacks}
    write_json(settings, tiny_suite(world).model_copy(update=changes).model_dump(mode="json"))

    def run(out: Path) -> int:
        monkeypatch.setenv("VLM_UNLEARN_CACHE", f"{out}-cache")  # where measurements of base models are shared
        return ForkedProcess([settings, tiny_model, out], program=program).wait(timeout=120)

    digest = digest_model(tiny_model)
    resumed, complete = tmp_path / "resumed", tmp_path / "complete"
    for marker in markers:
        assert not marker.exists()
        assert run(resumed) == -signal.SIGKILL
        assert marker.exists()
        assert not (resumed / "robustness.json").exists()
    assert run(resumed) == 0
    assert run(complete) == 0
    assert (resumed / "robustness.json").read_bytes() == (complete / "robustness.json").read_bytes()
    measurements = [
        {file.name: file.read_bytes() for file in (out / "measurements").iterdir()} for out in (resumed, complete)
    ]
    assert measurements[0] == measurements[1]
    assert digest_model(tiny_model) == digest
