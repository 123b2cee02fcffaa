"""Colors for people: on a terminal that has them, and nowhere else. Files, pipes and logs get plain text."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TextIO

BOLD, DIM, RED, YELLOW = "1", "2", "1;31", "33"
LEVELS = {"WARNING": YELLOW, "ERROR": RED, "CRITICAL": RED}
TIME = "%H:%M:%S"


def has_colors(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal with colors whose user has not switched them off (https://no-color.org)."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM", "") not in ("", "dumb")


def colored(text: str, code: str, on: bool = True) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if on and text else text


def with_title(text: str, stream: TextIO) -> str:
    """A table whose first line stands out, where the stream has colors."""
    title, newline, rest = text.partition("\n")
    return colored(title, BOLD, has_colors(stream)) + newline + rest


class LogFormatter(logging.Formatter):
    """A line of the log: time, level, message. With colors the time steps back, and what is wrong stands out."""

    def __init__(self, colors: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", TIME)
        self._colors = colors

    def formatMessage(self, record: logging.LogRecord) -> str:
        if not self._colors:
            return super().formatMessage(record)
        level = colored(record.levelname, LEVELS.get(record.levelname, DIM))
        return f"{colored(record.asctime, DIM)} {level} {record.message}"
