"""How soon a run starts: processor and wall-clock seconds from the command to its first pass.

    python -m benchmark.starting --repeats 5 --output starting.json

The demo model on the CPU. Of several starts the least counts, since whatever else the machine does only adds. ``new``:
with an empty home folder, where the CPU's kernels are compiled first. What the processor did is read when the run says
that it begins, so that its passes do not count; compilers are counted with it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark.machine import publish
from flexbatch.policy.stdout import run_process

ON_CPU = ["--device", "cpu", "--hardware", "cpu"]
COMMANDS = {
    "help": ["--help"],
    "known": ON_CPU,
    "new": ON_CPU,
}
BEGINS = " INFO running "


def processor_seconds(pid: int) -> float:
    """Of a process that runs, and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def start(words: list[str], environ: dict[str, str]) -> dict[str, float]:
    """Seconds to the line that says that passes begin, or to the end of a command that has none."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "flexbatch.run", *words]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if BEGINS in line:
                found = {"processor": processor_seconds(process.pid), "wall": time.perf_counter() - begun}
                process.kill()
                return found
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        found = {"processor": processor_seconds(process.pid), "wall": time.perf_counter() - begun}
        assert process.wait() == 0, f"{' '.join(command)} ended with {process.returncode}"
        return found


def measure(repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, words in COMMANDS.items():
        starts = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                starts.append(start(words, {**os.environ, **({"HOME": folder} if name == "new" else {})}))
        found[name] = {key: round(min(each[key] for each in starts), 3) for key in ("processor", "wall")}
        print(name, found[name], file=sys.stderr, flush=True)
    return {"load_average": os.getloadavg()[0], "seconds": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish(lambda: measure(args.repeats), args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
