"""Tab completes commands, shipped names, config keys and their values, and loads nothing heavy for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = (
    "import sys; sys.argv = ['vlm-unlearn']\nfrom vlm_unlearn.cli.main import main\n"
    "try: main()\nfinally:\n"
    "    heavy = {'torch', 'transformers', 'peft', 'plotly', 'datasets', 'openai', 'numpy', 'scipy'} & set(sys.modules)\n"
    "    assert not heavy, heavy"
)


def offered(line: str) -> list[str]:
    """What bash is told for the last word of a line."""
    words = line.split(" ")
    environment = {"_VLM_UNLEARN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=60
    )
    assert done.stderr == "", done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("vlm-unlearn tr", ["train"]),
        ("vlm-unlearn data im", ["import"]),
        ("vlm-unlearn train safety_mirage/npo_l", ["safety_mirage/npo_lora_13b", "safety_mirage/npo_lora_7b"]),
        ("vlm-unlearn train tiny/npo training.lear", ["training.learning_rate="]),
        ("vlm-unlearn train tiny/npo trainable.mode=", ["trainable.mode=full", "trainable.mode=lora", "trainable.mode=qlora"]),
        ("vlm-unlearn evaluate suites/safe_", ["suites/safe_eraser"]),
        ("vlm-unlearn evaluate suites/tiny judge.rubric=four", ["judge.rubric=four_labels"]),
        ("vlm-unlearn judge run evaluations/npo name=k", ["name=keyword"]),
        ("vlm-unlearn benchmark run gq", ["gqa"]),
        ("vlm-unlearn recipes suites/spec", ["suites/specificity"]),
        ("vlm-unlearn train tiny/npo --pl", ["--plan"]),
        ("vlm-unlearn train ./mine", []),
    ],
)
def test_what_is_offered(line: str, some: list[str]) -> None:
    assert offered(line) == some


def test_the_script_is_shown_without_a_network() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlm_unlearn.cli.main", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert "_VLM_UNLEARN_COMPLETE=complete_bash" in done.stdout


@pytest.mark.parametrize("missing", [{}, {"COMP_WORDS": "vlm-unlearn "}, {"COMP_WORDS": "vlm-unlearn ", "COMP_CWORD": "abc"}])
def test_a_shell_that_does_not_say_where_is_offered_nothing(missing: dict[str, str]) -> None:
    environment = {**os.environ, "_VLM_UNLEARN_COMPLETE": "complete_bash", **missing}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
