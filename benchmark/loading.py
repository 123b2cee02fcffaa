"""How long models take to load: a checkpoint of random weights is written once for each of its formats, then opened.

    python -m benchmark.loading --model llama-3-8b --folder /tmp/checkpoints --output loading.json
    python -m benchmark.loading --layers 12 --formats bf16 gptq awq compressed-tensors fp8 gguf-q4_0 ...

Starts for every format and number of bits: from the checkpoint with an empty offload folder ("first"), and "again"
with it (what it holds is reused); before the first with so many bits one more, in which kernels are compiled ("new").
"cold", where it is named and in 16 bits: of a checkpoint that the page cache has let go. --starts new again takes least
time: a first start of an environment, and all later ones. Beside them what the machine can do: how fast its files are
read from the page cache and past it, written to the disk, and copied from pinned memory to the GPU. Rates count bytes
of the checkpoint. bf16 is opened with each of --weight-bits, the other formats with as many bits as they have. What is
measured is written to --output at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmark.loading_files import BITS, FORMATS, GGUF_TYPES, write_checkpoint
from benchmark.machine import machine, publish
from flexbatch import LLM, SamplingParams
from flexbatch.memory import loading
from flexbatch.memory.disk_cache import aligned_empty
from flexbatch.memory.files import ALIGNMENT, READ_CHUNK_BYTES, DiskFile, chunks
from flexbatch.models.resolve import DEMO
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.stdout import run_process

VARIANTS = {"plain": (False, False), "staged": (True, False), "beside": (False, True), "both": (True, True)}
"""Whether pieces go to a GPU by way of pinned memory, and files of the next start are written beside the job."""

DIRECT_BYTES = 1 << 29
STARTS = "new", "first", "again", "cold"


def weight_files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf")]


def over_threads(files: list[Path], read: Callable[[Path], int]) -> float:
    """GB/s of reading all files, eight at a time."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        num_bytes = sum(pool.map(read, files))
    return round(num_bytes / (time.perf_counter() - begun) / 1e9, 2)


def read_cached(file: Path) -> int:
    with file.open("rb", buffering=0) as opened:
        buffer, total = bytearray(16 << 20), 0
        while count := opened.readinto(buffer):
            total += count
    return total


def read_directly(file: Path) -> int:
    """Past the page cache, the first `DIRECT_BYTES`: all of Llama-3-8B took 23 s of a disk that reads 0.7 GB/s."""
    opened, total = DiskFile(file), 0
    buffer = aligned_empty(READ_CHUNK_BYTES)
    with contextlib.closing(opened):
        for begin, end in chunks(min(DIRECT_BYTES, opened.num_bytes // ALIGNMENT * ALIGNMENT)):
            opened.read(buffer[: end - begin], begin)
            total += end - begin
    return total


def forget(files: list[Path]) -> None:
    """Let the page cache go of files."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speeds(model: Path, folder: Path, device: str) -> dict[str, float]:
    """GB/s: what loading cannot be faster than."""
    files = weight_files(model)
    found = {"read_cached": over_threads(files, read_cached), "read_disk": over_threads(files[:8], read_directly)}
    content = aligned_empty(READ_CHUNK_BYTES).random_()
    begun = time.perf_counter()
    with (
        contextlib.closing(DiskFile(folder / "written", 128 * READ_CHUNK_BYTES)) as file,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(lambda part: file.write(content, part * READ_CHUNK_BYTES), range(128)))
    found["write_disk"] = round(128 * READ_CHUNK_BYTES / (time.perf_counter() - begun) / 1e9, 2)
    if device == "cuda":
        source, target = (
            torch.zeros(1 << 30, dtype=torch.uint8).pin_memory(),
            torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
        )
        target.copy_(source)
        begun = time.perf_counter()
        for _ in range(3):
            target.copy_(source)
        found["link"] = round(3 * len(source) / (time.perf_counter() - begun) / 1e9, 2)
    return found


def forget_peak() -> None:
    """Have the system count the largest resident memory of this process anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak_bytes() -> int:
    """The mapped part of the checkpoint among them, at most 256 MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def start(model: Path, offload: Path, weight_bits: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds from `LLM(...)` to weights that are where the plan wants them, to a first answer, and from there to the
    end of an engine whose files are written. ``load_seconds`` are those of the weights alone, ``stages`` what all
    threads of the load did meanwhile."""
    prompt, params = [{"prompt_token_ids": list(range(5, 69))}], SamplingParams(max_tokens=1, ignore_eos=True)
    forget_peak()
    begun = time.perf_counter()
    with LLM(str(model), weight_bits=weight_bits, offload_dir=str(offload), **settings) as llm:
        opened = time.perf_counter() - begun
        llm.prepare(prompt, params)
        ready = time.perf_counter() - begun
        llm.generate(prompt, params)
        answered, peak = time.perf_counter() - begun, resident_peak_bytes()
        report = llm.report()
    return {
        "opened_seconds": round(opened, 2),
        "ready_seconds": round(ready, 2),
        "first_answer_seconds": round(answered, 2),
        "stages": {stage: round(seconds, 2) for stage, seconds in report["load_stages"].items()},
        "resident_peak_bytes": peak,
        "closing_seconds": round(time.perf_counter() - begun - answered, 2),
        "load_seconds": round(report["load_seconds"], 2),
        "loaded_bytes": report["loaded_bytes"],
        "reused_bytes": report["reused_bytes"],
    }


def kinds_of(wanted: Sequence[str], bits: int, found: Sequence[dict[str, Any]]) -> list[str]:
    """Of the starts that are wanted, those that there are after what was ``found``: the first of all with so many bits
    compiles kernels, in its load and beside it, and the page cache is emptied once."""
    new = all(each.get("weight_bits") != bits for each in found)
    return [kind for kind in STARTS if kind in wanted and (kind != "new" or new) and (kind != "cold" or bits == 16)]


def measure(args: argparse.Namespace, found: list[dict[str, Any]], tell: Callable[[], None]) -> None:
    """Adds rows to ``found``, and tells of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {} if args.gpu_memory is None else {"gpu_memory": args.gpu_memory}
    if args.percent is not None:
        settings["percent"] = tuple(args.percent)
    if args.hardware is not None:
        settings["hardware"] = args.hardware
    config = dict(SHAPES[args.model])
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    for form in args.formats:
        folder = args.folder / f"{args.model}-{form}"
        shutil.rmtree(folder, ignore_errors=True)
        begun = time.perf_counter()
        model = write_checkpoint(config, form, folder, device)
        size = sum(file.stat().st_size for file in weight_files(folder))
        row = {"model": args.model, "layers": config["num_hidden_layers"], "format": form, "bytes": size}
        found.append(
            {**row, "written_seconds": round(time.perf_counter() - begun, 1), **speeds(folder, args.folder, device)}
        )
        tell()
        own = {"tokenizer": str(DEMO)} if form in GGUF_TYPES else {}
        for bits in args.weight_bits if form == "bf16" else [BITS.get(form, 4)]:
            for parent, variant in itertools.product(args.offload_folders or [args.folder], args.variants):
                loading.STAGED, loading.BESIDE_JOB = VARIANTS[variant]
                offload = parent / f"offload-{form}-{bits}"
                for kind in kinds_of(args.starts, bits, found):
                    if kind in ("new", "first"):
                        shutil.rmtree(offload, ignore_errors=True)
                    if kind == "cold":
                        forget(weight_files(folder))
                    figures = start(model, offload, bits, settings | own)
                    rate = round(size / max(figures["load_seconds"], 1e-9) / 1e9, 2)
                    told = {"weight_bits": bits, "variant": variant, "offload_dir": str(offload), "start": kind}
                    found.append({**row, **told, **figures, "gigabytes_per_second": rate})
                    tell()
                shutil.rmtree(offload, ignore_errors=True)
        shutil.rmtree(folder)


def run(args: argparse.Namespace) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def tell() -> None:
        print(found[-1], file=sys.stderr, flush=True)
        if args.output is not None:
            args.output.write_text(json.dumps({"machine": machine(), "starts": found}, indent=1) + "\n")

    measure(args, found, tell)
    return {"starts": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", choices=sorted(SHAPES))
    parser.add_argument("--formats", nargs="+", default=["bf16", "gptq"], choices=FORMATS)
    parser.add_argument("--layers", type=int, help="of the model (default: all that it has)")
    parser.add_argument("--hardware", help="the profile of the machine (default: a known or measured one)")
    parser.add_argument("--weight-bits", nargs="+", type=int, default=[16, 8, 4], choices=(16, 8, 4))
    parser.add_argument("--gpu-memory", help="the cap of the engine (default: what the GPU has)")
    parser.add_argument("--percent", type=float, nargs=6, help="a placement, instead of the chosen one")
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and offload files")
    parser.add_argument("--offload-folders", type=Path, nargs="+", help="places for offload files (default: --folder)")
    parser.add_argument("--variants", nargs="+", default=["both"], choices=VARIANTS, help="of loading, one by one")
    parser.add_argument("--starts", nargs="+", default=STARTS[:3], choices=STARTS, help="default: all but the cold one")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    return publish(lambda: run(args), args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
