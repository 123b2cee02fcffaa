"""SIGHUP: the terminal or the session over the network in which a command was started has ended.

A command stops then as by SIGTERM, with an exit code of its own. Under nohup the signal is ignored, and it goes on. The
signal comes more than once, from the kernel and from the shell, and systemd sends it right after SIGTERM: only the
first of these stops something. What stderr was may be gone.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class HangUp:
    """The handler of a command, of SIGTERM as well, which decides about the exit code: those that take its place for a
    while tell it."""

    def __init__(self) -> None:
        self.came = self.stopping = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        hangs_up = number == signal.SIGHUP
        goes_on = self.came or (hangs_up and self.stopping)
        self.came, self.stopping = self.came or hangs_up, True
        if not goes_on:
            raise KeyboardInterrupt


def hangup_signals() -> tuple[int, ...]:
    """SIGHUP, unless it is ignored."""
    return () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)


def note(handler: Any) -> None:
    """SIGHUP has come to another handler, in place of this one."""
    if isinstance(handler, HangUp):
        handler.came = True


def hung_up() -> bool:
    """Whether SIGHUP has come to this command."""
    handler = signal.getsignal(signal.SIGHUP)
    return isinstance(handler, HangUp) and handler.came
