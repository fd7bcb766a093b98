"""A shell in which some programs are functions of this process: the shell is real, and nothing is imported again for each command."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

LONGEST = 180.0  # seconds for one script
Program = Callable[
    [list[str]], int
]  # arguments -> exit code; called in the caller's folder, with its environment and output

_DOOR = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as door:
    door.connect({address!r})
    socket.send_fds(door, [b"."], [1, 2])
    called = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    door.sendall(json.dumps([called, os.getcwd(), dict(os.environ)]).encode())
    door.shutdown(socket.SHUT_WR)
    code = door.recv(8)
sys.exit(int(code or b"1"))
"""


@dataclass(frozen=True)
class Done:
    """How a script ended."""

    code: int
    line: int  # of the script, where it failed
    command: str  # which command did
    stdout: str
    stderr: str


class Shell:
    """Runs scripts with bash; each stops at the first command that fails."""

    def __init__(self, programs: Mapping[str, Program], folder: Path, address: str) -> None:
        self._programs = programs
        self._folder = folder
        self._address = address
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen()
        for name in programs:
            door = folder / name
            door.write_text(_DOOR.format(python=sys.executable, address=address))
            door.chmod(0o755)

    def close(self) -> None:
        self._listener.close()

    def run(self, script: str, cwd: Path, environment: Mapping[str, str]) -> Done:
        """Runs a script to its end or its first failure."""
        file, failed = self._folder / "script.sh", self._folder / "failed"
        failed.unlink(missing_ok=True)
        trap = f'trap \'printf "%s %s" "$LINENO" "$BASH_COMMAND" > {failed}\' ERR; '
        file.write_text(f"set -eo pipefail; {trap}{script.lstrip(' ')}\n", encoding="utf-8")
        path = os.pathsep.join([str(self._folder), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        with (self._folder / "stdout").open("w+b") as out, (self._folder / "stderr").open("w+b") as err:
            process = subprocess.Popen(
                ["bash", str(file)],
                cwd=cwd,
                env={**os.environ, **environment, "PATH": path},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                stdout=out,
                stderr=err,
            )
            deadline = time.monotonic() + LONGEST
            while process.poll() is None:
                if time.monotonic() > deadline:  # a server, say, that nobody stops
                    os.killpg(process.pid, signal.SIGKILL)
                if select.select([self._listener], [], [], 0.02)[0]:
                    self._answer()
            texts = [
                (self._folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")
            ]
        line, _, command = failed.read_text(encoding="utf-8").partition(" ") if failed.exists() else ("1", "", "")
        return Done(process.returncode, int(line), command, *texts)

    def _answer(self) -> None:
        visitor, _ = self._listener.accept()
        with visitor:
            _, descriptors, _, _ = socket.recv_fds(visitor, 1, 2)
            called = json.loads(b"".join(iter(lambda: visitor.recv(65_536), b"")))
            code = self._call(*called, descriptors)
            visitor.sendall(str(code).encode())

    def _call(self, words: list[str], cwd: str, environment: Mapping[str, str], descriptors: Iterable[int]) -> int:
        stdout, stderr = (os.fdopen(descriptor, "w", encoding="utf-8") for descriptor in descriptors)
        pipe = os.dup(stdout.fileno())
        try:
            with _within(cwd, environment), redirect_stdout(stdout), redirect_stderr(stderr):
                code = self._programs[words[0]](words[1:])
                stdout.flush()
                return 0 if _nobody_reads(pipe) else code  # as `head`, that has seen enough
        except BrokenPipeError:
            return 0
        except BaseException:
            stderr.write(traceback.format_exc())
            return 1
        finally:
            os.close(pipe)
            for stream in (stderr, stdout):
                with suppress(BrokenPipeError):
                    stream.close()


def _nobody_reads(descriptor: int) -> bool:
    """Whether a descriptor is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, select.POLLERR)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def _within(cwd: str, environment: Mapping[str, str]) -> Iterator[None]:
    before, folder = dict(os.environ), os.getcwd()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def shell(programs: Mapping[str, Program]) -> Iterator[Shell]:
    """A shell for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="sh-") as folder:  # a socket's address must be short
        opened = Shell(programs, Path(folder), f"{folder}/door")
        try:
            yield opened
        finally:
            opened.close()
