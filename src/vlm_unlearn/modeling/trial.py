"""Tries untrusted files in a process with limits, before this process uses them.

A chat template is a program, and a regular expression can take longer than the universe exists. A thread or a signal
cannot stop the tokenizers library, which does not release the interpreter. A process can be stopped.

A folder that passed is not tried again: the cache folder contains the digest of its files.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.modeling import trial_program
from vlm_unlearn.modeling.size_limits import validate_config_sizes, validate_processor_sizes
from vlm_unlearn.store import cache_folder, digest_file, digest_json

SECONDS = 30.0  # of the steps. The start of the process is not counted
MEMORY_BYTES = 3 << 30
START_SECONDS = 300.0  # the imports of a process on a slow file system
PATTERN_SECONDS = 10.0
PATTERN_MEMORY_BYTES = 1 << 30
# Files that a trial does not read. They differ between the runs of one model.
_OTHER_FILES = ("config.json", "generation_config.json", "manifest.json", "adapter_config.json", "base_model.json")
_PLAIN_NAME = re.compile(r"[\w.-]*")


class Pattern(NamedTuple):
    """A regular expression of a file."""

    file: Path
    field: str
    function: str  # of `re`, that its user calls
    text: str  # the text in the file
    expression: str  # the expression that its user makes of the text


def check_processor_files(folder: Path) -> None:
    """Checks the untrusted files of a processor: their sizes, and whether they can be used within limits.

    Raises:
        UserError: A file describes something gigantic, or needs too much time or memory.
    """
    validate_config_sizes(folder)
    validate_processor_sizes(folder)
    try_processor_files(folder)


def try_processor_files(folder: Path) -> None:
    """Loads and uses the tokenizer and the chat templates of a model folder in a process with limits.

    It renders short conversations and tokenizes about 100 texts, among them long runs of each character that the
    tokenizer's patterns contain. A pattern or template that needs forever only for certain other texts can pass.

    Args:
        folder: The model folder.

    Raises:
        UserError: A step exceeds the limit of time or memory, or crashes. `file` and `field` name the cause.
    """
    tokenizers = sorted(
        str(file.parent.relative_to(folder)).removeprefix(".")
        for file in (*folder.glob("tokenizer.json"), *folder.glob("*/tokenizer.json"))
    )
    marker = cache_folder() / "trials" / _digest(folder, tokenizers)
    if marker.is_file():
        return
    outcome = _run({"folder": str(folder.resolve()), "tokenizers": tokenizers}, folder, SECONDS, MEMORY_BYTES)
    if outcome == "passed":
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        except OSError:  # without a cache, each process tries the folder again
            pass


def try_patterns(patterns: Sequence[Pattern], names: Sequence[str]) -> None:
    """Matches regular expressions against the names of modules in a process with limits.

    Plain names are not tried.

    Raises:
        UserError: A pattern exceeds the limit of time or memory. `file` and `field` name it.
    """
    expressions = [pattern for pattern in patterns if not _PLAIN_NAME.fullmatch(pattern.text)]
    if expressions:
        request = {
            "patterns": [
                [str(pattern.file), pattern.field, pattern.function, pattern.expression] for pattern in expressions
            ],
            "names": list(names),
        }
        _run(request, Path(), PATTERN_SECONDS, PATTERN_MEMORY_BYTES)


def _digest(folder: Path, tokenizers: Sequence[str]) -> str:
    """Returns a digest of the files that a trial reads, its rules and the libraries."""
    folders = [folder, folder / "additional_chat_templates", *(folder / name for name in tokenizers)]
    files = sorted(
        file
        for path in dict.fromkeys(folders)
        for file in path.glob("*")
        if file.suffix in (".json", ".jinja", ".model", ".txt")
        and file.is_file()
        and file.name not in _OTHER_FILES
        and not file.name.endswith(".index.json")
    )
    libraries = {name: version(name) for name in ("transformers", "tokenizers", "jinja2")}
    rules = digest_file(Path(trial_program.__file__))
    return digest_json([{str(file.relative_to(folder)): digest_file(file) for file in files}, libraries, rules])


def _run(request: Mapping[str, Any], folder: Path, seconds: float, memory_bytes: int) -> str:
    """Runs a request in a process, and returns its outcome: ``passed`` or ``failed``.

    Raises:
        UserError: The process exceeded a limit, panicked or crashed.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # The pools of further threads would count against the limit of memory.
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1"),
    }
    message = json.dumps({**request, "seconds": seconds, "memory_bytes": memory_bytes})
    process = subprocess.Popen(
        [sys.executable, "-P", trial_program.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=environment,
    )
    with process:
        try:
            output, _ = process.communicate(message, timeout=START_SECONDS + seconds)
            timed_out = process.returncode == -14  # SIGALRM, the end of the timer
        except subprocess.TimeoutExpired:
            process.kill()
            output, timed_out = process.communicate()[0], True
        except BaseException:  # such as KeyboardInterrupt
            process.kill()
            raise
    lines = [json.loads(line) for line in output.splitlines()]
    outcome = lines.pop() if lines and "outcome" in lines[-1] else {}
    if not lines or outcome.get("outcome") in ("passed", "failed"):  # without a step, the imports have failed
        return str(outcome.get("outcome", "failed"))
    if timed_out:
        problem = f"takes more than {seconds:g} s"
    elif outcome:
        problem = f"crashes ({quoted(outcome['reason'], 200)})"
    else:
        problem = f"takes more than {memory_bytes / (1 << 30):g} GB of memory, or crashes"
    step = lines[-1]
    raise UserError(
        f"{step['action']} {problem}. Correct the file, or use the original one.",
        code="resource-limit",
        file=folder / step["file"],
        field=step["field"],
    )
