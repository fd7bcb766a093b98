"""A real shell in which some programs are functions of this process, so that each command needs no new imports."""

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
from unittest.mock import patch

MAX_SECONDS = 180.0  # for one script
# arguments -> exit code; called in the folder of the caller, with its environment and output
Program = Callable[[list[str]], int]

_CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    socket.send_fds(connection, [b"."], [0, 1, 2])
    request = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    connection.sendall(json.dumps([request, os.getcwd(), dict(os.environ)]).encode())
    connection.shutdown(socket.SHUT_WR)
    code = connection.recv(8)
sys.exit(int(code or b"1"))
"""


@dataclass(frozen=True)
class Done:
    """The result of a script."""

    code: int
    line: int  # of the script, where it failed
    command: str  # the command that failed
    stdout: str
    stderr: str


class Shell:
    """Runs scripts with bash. A script stops at the first command that fails."""

    def __init__(self, programs: Mapping[str, Program], folder: Path, address: str) -> None:
        self._programs = programs
        self._folder = folder
        self._address = address
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen()
        for name in programs:
            client = folder / name
            client.write_text(_CLIENT.format(python=sys.executable, address=address))
            client.chmod(0o755)

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
            deadline = time.monotonic() + MAX_SECONDS
            while process.poll() is None:
                if time.monotonic() > deadline:  # for example a server
                    os.killpg(process.pid, signal.SIGKILL)
                if select.select([self._listener], [], [], 0.02)[0]:
                    self._answer()
            texts = [
                (self._folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")
            ]
        line, _, command = failed.read_text(encoding="utf-8").partition(" ") if failed.exists() else ("1", "", "")
        return Done(process.returncode, int(line), command, *texts)

    def _answer(self) -> None:
        client, _ = self._listener.accept()
        with client:
            _, descriptors, _, _ = socket.recv_fds(client, 1, 3)
            request = json.loads(b"".join(iter(lambda: client.recv(65_536), b"")))
            code = self._call(*request, descriptors)
            client.sendall(str(code).encode())

    def _call(self, words: list[str], cwd: str, environment: Mapping[str, str], descriptors: Iterable[int]) -> int:
        modes = zip(descriptors, "rww", strict=True)
        stdin, stdout, stderr = (os.fdopen(descriptor, mode, encoding="utf-8") for descriptor, mode in modes)
        pipe = os.dup(stdout.fileno())
        try:
            with (
                _within(cwd, environment),
                patch("sys.stdin", stdin),
                redirect_stdout(stdout),
                redirect_stderr(stderr),
            ):
                code = self._programs[words[0]](words[1:])
                stdout.flush()
                return 0 if _is_closed(pipe) else code  # as by `head`
        except BrokenPipeError:
            return 0
        except BaseException:
            stderr.write(traceback.format_exc())
            return 1
        finally:
            os.close(pipe)
            stdin.close()
            for stream in (stderr, stdout):
                with suppress(BrokenPipeError):
                    stream.close()


def _is_closed(descriptor: int) -> bool:
    """Whether a descriptor is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, select.POLLERR)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def _within(cwd: str, environment: Mapping[str, str]) -> Iterator[None]:
    outer, folder = dict(os.environ), os.getcwd()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(outer)


@contextmanager
def shell(programs: Mapping[str, Program]) -> Iterator[Shell]:
    """Opens a shell for the duration of the block."""
    with tempfile.TemporaryDirectory(prefix="sh-") as folder:  # a socket's address must be short
        opened = Shell(programs, Path(folder), f"{folder}/socket")
        try:
            yield opened
        finally:
            opened.close()
