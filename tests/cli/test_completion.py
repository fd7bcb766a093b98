"""Tab completes commands, shipped names, config keys and their values, and loads nothing heavy for it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

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
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=60,
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
        (
            "vlm-unlearn train tiny/npo trainable.mode=",
            ["trainable.mode=full", "trainable.mode=lora", "trainable.mode=qlora"],
        ),
        ("vlm-unlearn evaluate suites/safe_", ["suites/safe_eraser"]),
        ("vlm-unlearn evaluate suites/tiny judge.rubric=four", ["judge.rubric=four_labels"]),
        ("vlm-unlearn judge run evaluations/npo name=k", ["name=keyword"]),
        ("vlm-unlearn benchmark run gq", ["gqa"]),
        ("vlm-unlearn recipes suites/spec", ["suites/specificity"]),
        ("vlm-unlearn train tiny/npo --pl", ["--plan"]),
        ("vlm-unlearn train ./mine", []),
        ("vlm-unlearn train tiny/npo method=n", ["method=npo"]),
        ("vlm-unlearn train tiny/npo method.name=rm", ["method.name=rmu"]),
        ("vlm-unlearn train tiny/npo method.be", ["method.beta="]),
        ("vlm-unlearn table demo --table safety_mirage_", ["safety_mirage_published", "safety_mirage_answers"]),
        ("vlm-unlearn table demo --format t", ["tex"]),
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


SHOW = (
    "import sys; sys.argv = ['vlm-unlearn', '--show-completion', 'bash']\nfrom vlm_unlearn.cli.main import main; main()"
)
DETECT_NO_SHELL = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "then"),
    [
        ("train tiny/npo trainable.mode=q", "trainable.mode=qlora "),
        ("train tiny/npo method=n", "method=npo "),
        ("train tiny/npo training.lear", "training.learning_rate="),  # and no blank behind it
        ("train tiny/npo method.name=simn", "method.name=simnpo "),
        ("train tiny/npo training.learning_rate=1e-4 training.sched", "training.lr_scheduler_type="),
    ],
)
def test_a_word_is_completed_in_bash_itself(typed: str, then: str, tmp_path: Path) -> None:
    """Tab is typed at a pseudo terminal; bash takes `key=value` apart, and sets a blank behind a word that is whole."""
    script = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, check=True, env=os.environ | DETECT_NO_SHELL
    ).stdout
    (tmp_path / "rc").write_text(script + "\nPS1='ready> '\nbind 'set enable-bracketed-paste off'\n")
    (tmp_path / "vlm-unlearn").write_text(f'#!/bin/sh\nexec {sys.executable} -m vlm_unlearn.cli.main "$@"\n')
    (tmp_path / "vlm-unlearn").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TERM": "dumb", "COLUMNS": "200"}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    bash = subprocess.Popen(
        ["bash", "--noprofile", "--rcfile", str(tmp_path / "rc"), "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
        cwd=tmp_path,
    )
    os.close(theirs)
    try:
        until(ours, "ready> ")
        os.write(ours, f"vlm-unlearn {typed}\t".encode())
        shown = until(ours, then)
        os.write(ours, b"|")
        assert f"{then}|" in shown + until(ours, "|")
    finally:
        bash.kill()
        bash.wait()
        os.close(ours)


def until(terminal: int, text: str, seconds: float = 60) -> str:
    """What the terminal shows until `text` is in it, or the time is up."""
    shown, end = "", time.monotonic() + seconds
    while text not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


@pytest.mark.parametrize(
    "missing", [{}, {"COMP_WORDS": "vlm-unlearn "}, {"COMP_WORDS": "vlm-unlearn ", "COMP_CWORD": "abc"}]
)
def test_a_shell_that_does_not_say_where_is_offered_nothing(missing: dict[str, str]) -> None:
    environment = {**os.environ, "_VLM_UNLEARN_COMPLETE": "complete_bash", **missing}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=environment, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
