"""Runs the command in a pseudo terminal of any width, with Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping

from helpers import command

CTRL_C = b"\x03"


def _take_terminal() -> None:
    """Makes the pseudo terminal the controlling one, and Ctrl-C effective if the caller of the tests ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def at_terminal(
    *arguments: object,
    columns: int = 80,
    environment: Mapping[str, str] | None = None,
    stop_at: str = "",
    seconds: float = 150,
) -> tuple[int, str]:
    """Returns the exit code and the output of a command in a terminal.

    Args:
        stop_at: Types Ctrl-C as soon as the output matches this pattern.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        command(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_take_terminal,
        # Without COLUMNS and LINES, which a library of this process may have set.
        env={
            **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
            "TERM": "xterm",
            **(environment or {}),
        },
    )
    os.close(theirs)
    output, typed, end = b"", not stop_at, time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    data = os.read(ours, 65536)
                except OSError:  # on Linux, all writers have closed the terminal
                    break
                if not data:
                    break
                output += data
            if not typed and re.search(stop_at.encode(), output):
                os.write(ours, CTRL_C)
                typed = True
        assert time.monotonic() < end, output.decode(errors="replace")
    finally:
        if process.poll() is None and time.monotonic() >= end:
            process.kill()
        os.close(ours)
    return process.wait(), output.decode(errors="replace")
