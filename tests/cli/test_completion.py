"""Shell completion of commands, shipped names, config keys and their values, without heavy modules."""

from __future__ import annotations

import fcntl
import json
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

from vlm_unlearn.cli.completion import _method_options
from vlm_unlearn.methods import METHODS

# Completes each command line as bash would, all in one process, and reports the heavy modules. Bash replaces only the
# text after an equals sign.
PROGRAM = """
import contextlib, io, json, os, sys
from vlm_unlearn.cli.main import main
completions = []
for environment in json.loads(sys.argv[1]):
    sys.argv[:] = ["vlm-unlearn"]
    for name in ("COMP_WORDS", "COMP_CWORD"):
        os.environ.pop(name, None)
    os.environ.update(environment, _VLM_UNLEARN_COMPLETE="complete_bash")
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    completions.append([code, out.getvalue().split(), err.getvalue()])
heavy = {"torch", "transformers", "peft", "matplotlib", "datasets", "openai", "numpy", "scipy"} & set(sys.modules)
print(json.dumps([completions, sorted(heavy)]))
"""
EXPECTED = {
    "tr": ["train"],
    "data im": ["import"],
    "data to": ["to-rmu"],
    "train safety_mirage/npo_l": ["safety_mirage/npo_lora_13b", "safety_mirage/npo_lora_7b"],
    "train tiny/npo training.lear": ["training.learning_rate="],
    "train tiny/npo trainable.mode=": ["full", "lora", "qlora"],
    "evaluate suites/safe_": ["suites/safe_eraser"],
    "evaluate suites/tiny judge.rubric=four": ["four_labels"],
    "judge run evaluations/npo name=k": ["keyword"],
    "evaluate suites/tiny generation.backend = v": ["vllm"],
    "benchmark run gq": ["gqa"],
    "recipes suites/spec": ["suites/specificity"],
    "train tiny/npo --pl": ["--plan"],
    "train ./mine": [],
    "train tiny/npo method=n": ["npo"],
    "train tiny/npo method.name=rm": ["rmu"],
    "train tiny/npo method.be": ["method.beta="],
    "table demo --table safety_mirage_": ["safety_mirage_published", "safety_mirage_answers"],
    "table demo --format t": ["tex"],
    "table demo --format = t": ["tex"],
    "train tiny/npo trainable.mode =": ["full", "lora", "qlora"],
    "train tiny/npo trainable.mode = q": ["qlora"],
}
WITHOUT_POSITION: list[dict[str, str]] = [
    {},
    {"COMP_WORDS": "vlm-unlearn "},
    {"COMP_WORDS": "vlm-unlearn ", "COMP_CWORD": "abc"},
]


@pytest.mark.multiprocess
def test_completions_match_and_load_nothing_heavy() -> None:
    requests = [
        {"COMP_WORDS": "\n".join(["vlm-unlearn", *line.split(" ")]), "COMP_CWORD": str(len(line.split(" ")))}
        for line in EXPECTED
    ] + WITHOUT_POSITION
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(requests)], capture_output=True, text=True, check=True, timeout=60
    )
    completions, heavy = json.loads(done.stdout)
    offered = dict(zip(EXPECTED, completions, strict=False))
    assert {line: words for line, (_, words, _) in offered.items()} == EXPECTED
    assert not any(errors for _, _, errors in completions)
    assert completions[len(EXPECTED) :] == [[0, [], ""]] * len(WITHOUT_POSITION)
    assert heavy == []


def test_options_read_from_sources_include_those_of_every_method() -> None:
    options = {option for method in METHODS.values() for option in method.options_type.model_fields}
    assert options <= set(_method_options())


def completion_script() -> str:
    """The script that ``--show-completion`` prints for bash, without detecting the user's shell."""
    return subprocess.run(
        [sys.executable, "-m", "vlm_unlearn.cli.main", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    ).stdout


def test_completion_script_names_our_variable() -> None:
    assert "_VLM_UNLEARN_COMPLETE=complete_bash" in completion_script()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_words_are_completed_in_a_real_bash(tmp_path: Path) -> None:
    """Tab is typed at a pseudo terminal. Bash splits ``key=value``, and adds a space after a complete word."""
    (tmp_path / "rc").write_text(completion_script() + "\nPS1='ready> '\nbind 'set enable-bracketed-paste off'\n")
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
        read_until(ours, "ready> ")
        for typed, completed in (
            ("train tiny/npo trainable.mode=q", "trainable.mode=qlora "),
            ("train tiny/npo method=n", "method=npo "),
            ("train tiny/npo training.lear", "training.learning_rate="),  # and no space after it
            ("train tiny/npo method.name=simn", "method.name=simnpo "),
            ("train tiny/npo training.learning_rate=1e-4 training.lr_sched", "training.lr_scheduler_type="),
        ):
            os.write(ours, f"vlm-unlearn {typed}\t".encode())
            output = read_until(ours, completed)
            os.write(ours, b"|")
            assert f"{completed}|" in output + read_until(ours, "|")
            os.write(ours, b"\x15")  # Ctrl-U deletes the line
    finally:
        bash.kill()
        bash.wait()
        os.close(ours)


def read_until(terminal: int, text: str, seconds: float = 60) -> str:
    """The output of a terminal until it contains the text, or the time is up."""
    output, end = "", time.monotonic() + seconds
    while text not in output and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            output += os.read(terminal, 65536).decode(errors="replace")
    return output
