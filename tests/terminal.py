"""Runs the command as somebody at a terminal does: a pseudo terminal of any width, and Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping

from helpers import command

CTRL_C = b"\x03"


def at_terminal(
    *arguments: object,
    columns: int = 80,
    environment: Mapping[str, str] | None = None,
    stop_at: str = "",
    seconds: float = 150,
) -> tuple[int, str]:
    """The exit code, and everything that the terminal was sent.

    Args:
        stop_at: Ctrl-C is typed as soon as this pattern is seen.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        command(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        # Without the size that a library of this process may have set: the terminal has its own.
        env={
            **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
            "TERM": "xterm",
            **(environment or {}),
        },
    )
    os.close(theirs)
    seen, typed, end = b"", not stop_at, time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    part = os.read(ours, 65536)
                except OSError:  # Linux's way to say that nobody writes any more
                    break
                if not part:
                    break
                seen += part
            if not typed and re.search(stop_at.encode(), seen):
                os.write(ours, CTRL_C)
                typed = True
        assert time.monotonic() < end, seen.decode(errors="replace")
    finally:
        if process.poll() is None and time.monotonic() >= end:
            process.kill()
        os.close(ours)
    return process.wait(), seen.decode(errors="replace")
