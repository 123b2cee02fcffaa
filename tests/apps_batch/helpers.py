"""Running the batch command with the fake engine, in this process and in others."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flexbatch.apps.batch import main
from tests.apps_batch.fake import FakeLLM
from tests.processes import Forked

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "tests" / "data"
RESULTS = ("generated_text", "finish_reason", "num_input_tokens", "num_generated_tokens", "error")


def benchmark_prompts(rows: int, longest: int = 200) -> list[str]:
    """Different prompts made of those of public benchmarks."""
    names = ("gsm8k_test.jsonl", "humaneval.jsonl", "mt_bench.jsonl")
    texts = [
        json.loads(line)["prompt"]
        for name in names
        for line in (PROMPTS / name).read_text(encoding="utf-8").splitlines()
    ]
    return [f"{row}: {texts[row % len(texts)]}"[:longest] for row in range(rows)]


def write_input(path: Path, prompts: Sequence[str | None], row_group_size: int = 37, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"id": list(range(len(prompts))), "prompt": pa.array(prompts, pa.string()), **columns}),
        path,
        row_group_size=row_group_size,
    )
    return path


def run_here(*words: object, fake: FakeLLM | None = None, **settings: Any) -> int:
    """The command in this process; its exit code."""
    engine = fake or FakeLLM(**settings)
    return main(
        [str(word) for word in words],
        open_engine=lambda config, seen: engine,
        identity=lambda config: {"weights": f"fake {config.model}"},
    )


def command(*words: object, **settings: Any) -> list[str]:
    return [sys.executable, "-m", "tests.apps_batch.driver", json.dumps(settings), *map(str, words)]


def start(*words: object, environ: dict[str, str] | None = None, **settings: Any) -> Forked:
    """The command as a process of its own."""
    return Forked(
        "tests.apps_batch.driver", [json.dumps(settings), *map(str, words)], {"OMP_NUM_THREADS": "1", **(environ or {})}
    )


def wait_for(condition: Callable[[], object], process: Forked | None = None, seconds: float = 30.0) -> None:
    """Until the condition holds, or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < end, f"nothing happened within {seconds} s"
        time.sleep(0.002)


def kill_at(
    moments: Iterable[Callable[[], bool]],
    start: Callable[[], Forked],
    seconds: float = 30.0,
    signals: Sequence[int] = (signal.SIGKILL,),
) -> None:
    """Starts a job for each of the moments and kills it when that has come, by the signals in turn; the next moment is
    asked for after that."""
    for reached, number in zip(moments, itertools.cycle(signals), strict=False):
        process = start()
        wait_for(reached, process, seconds)
        process.send_signal(number)
        process.communicate()


def parts_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("part-*.parquet") if not path.name.startswith("."))


def read_output(folder: Path) -> pa.Table:
    """All parts in the order of their numbers, each read by itself."""
    tables = [pq.ParquetFile(path).read() for path in sorted(parts_of(folder), key=lambda path: path.name)]
    return pa.concat_tables(tables)


def journal_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / ".flexbatch").glob("journal-*.log"))
