"""The README's pictures of a terminal: commands run on a terminal of their own, and what they show becomes an SVG.

    pip install rich && python -m benchmark.screenshots

No GPU is needed; the demo model completes the prompts of the tests.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COLUMNS, MOST_LINES = 104, 46
HARDWARE = ["--device", "cpu", "--hardware", "cpu"]
"""So that nothing is measured, and every machine shows the same plan."""


def terminal_output(words: Sequence[str], folder: Path) -> str:
    """What a command writes to a terminal of so many columns, with its colors. Raises CalledProcessError unless it ends
    with 0 or 3, rows with errors."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", MOST_LINES, COLUMNS, 0, 0))
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT)}
    variables.pop("NO_COLOR", None)
    command = [sys.executable, "-m", *words]
    with subprocess.Popen(command, cwd=folder, env=variables, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        pieces = []
        while True:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:  # on Linux the end of a terminal's other side
                break
            if not piece:
                break
            pieces.append(piece)
    os.close(master)
    if process.returncode not in (0, 3):
        raise subprocess.CalledProcessError(process.returncode, command, b"".join(pieces))
    return b"".join(pieces).decode(errors="replace")


def as_seen(output: str) -> list[str]:
    """The lines that stand on the screen at the end: what a bar has written over is gone."""
    lines = []
    for line in output.replace("\r\n", "\n").split("\n"):
        states = [state for state in line.split("\r") if state.strip()]
        lines.append(states[-1] if states else "")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def picture(command: str, lines: Sequence[str], title: str) -> str:
    """The SVG of a window with a command and its output; the middle of a long one is left out."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError as error:
        raise SystemExit("the pictures are drawn by rich: pip install rich") from error
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        lines = [*lines[:half], "...", *lines[-half:]]
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi(f"\x1b[1m$ {command}\x1b[0m"))
    for line in lines:
        console.print(Text.from_ansi(line))
    # Fonts would be fetched from elsewhere by whoever looks at the picture.
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)


def first_command(folder: Path) -> tuple[str, list[str]]:
    words = ["run", "--num-prompts", "3", "--max-tokens", "32"]
    return shlex.join(["flexbatch", *words]), as_seen(terminal_output(["flexbatch", *words, *HARDWARE], folder))


def batch_job(folder: Path) -> tuple[str, list[str]]:
    """A table of questions, two of which cannot be run."""
    source = folder / "questions.csv"
    prompts = (ROOT / "tests" / "data" / "humaneval.jsonl").read_text(encoding="utf-8").splitlines()[:38]
    rows = [json.loads(line)["prompt"] for line in prompts] + ["", "word " * 4000]
    source.write_text("question\n" + "".join('"' + row.replace('"', '""') + '"\n' for row in rows))
    words = ["batch", "questions.csv", "answers", "--prompt-column", "question", "--max-tokens", "48"]
    return shlex.join(["flexbatch", *words]), as_seen(terminal_output(["flexbatch", *words, *HARDWARE], folder))


PICTURES = {"first_run.svg": (first_command, "flexbatch run"), "batch_job.svg": (batch_job, "flexbatch batch")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmark.screenshots", description="Draw the README's pictures.")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the pictures (default: docs)")
    options = parser.parse_args(arguments)
    for name, (run, title) in PICTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            command, lines = run(Path(folder))
        (options.output / name).write_text(picture(command, lines, title), encoding="utf-8")
        print(options.output / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
