"""Colors on a terminal that wants them and nowhere else, and pictures of what a terminal shows."""

from __future__ import annotations

import io
import logging
import subprocess
from pathlib import Path

import pytest

from benchmark.screenshots import as_seen, picture, terminal_output
from flexbatch.cli.colors import LogFormatter, colored, has_colors, with_title


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "wanted"),
    [
        (Terminal(), {"TERM": "xterm-256color"}, True),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": ""}, True),  # as the convention has it
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {}, False),
        (io.StringIO(), {"TERM": "xterm-256color"}, False),
    ],
)
def test_colors_are_for_terminals_whose_users_want_them(stream, environ: dict[str, str], wanted: bool) -> None:
    assert has_colors(stream, environ) == wanted


def test_a_line_of_the_log_is_the_same_but_for_its_colors() -> None:
    record = logging.LogRecord("flexbatch", logging.ERROR, "x.py", 1, "told %s", ("twice",), None)
    plain, shown = LogFormatter(False).format(record), LogFormatter(True).format(record)
    assert plain.endswith(" ERROR told twice") and "\x1b" not in plain
    assert "\x1b[1;31mERROR\x1b[0m" in shown and shown.endswith(" told twice")
    assert colored("", "1") == "" and with_title("title\nrow", io.StringIO()) == "title\nrow"


ERROR = ["flexbatch", "run", "--device", "tpu"]


def test_a_command_has_colors_on_a_terminal_alone(tmp_path: Path) -> None:
    """On a real one; that stderr of a pipe is plain, every other test of a command shows."""
    with pytest.raises(subprocess.CalledProcessError) as shown:
        terminal_output(ERROR, tmp_path)
    assert shown.value.returncode == 2 and b"\x1b[1;31mERROR\x1b[0m" in shown.value.output


def test_the_screen_shows_what_is_left_of_a_bar() -> None:
    assert as_seen("a\r\n  0%|  |\r 50%|= |\r100%|==|\r\nend\r\n\r\n") == ["a", "100%|==|", "end"]


def test_a_picture_fetches_nothing_and_leaves_the_middle_of_a_long_output_out() -> None:
    pytest.importorskip("rich")
    svg = picture("flexbatch run", [f"\x1b[1mline {number}\x1b[0m" for number in range(200)], "title")
    text = svg.replace("&#160;", " ")
    assert "$ flexbatch run" in text and "line 0" in text and "line 199" in text and "line 100<" not in text
    assert "@font-face" not in svg and "url(http" not in svg
