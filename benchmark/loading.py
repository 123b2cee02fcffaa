"""How long models take to load: a checkpoint of random weights is written once for each of its formats, then opened.

    python -m benchmark.loading --model llama-3-8b --folder /tmp/checkpoints --output loading.json
    python -m benchmark.loading --layers 12 --formats bf16 gptq awq compressed-tensors fp8 gguf-q4_0 ...

Three starts for every format and number of bits: from the checkpoint with an empty offload folder, again with it (what
it holds is reused), and, first of all, the speed at which the files can be read by this machine's Python, in four
threads, since they were just written and lie in the page cache. Rates count bytes of the checkpoint. bf16 is opened
with each of --weight-bits, the other formats with as many bits as they have.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmark.loading_files import BITS, FORMATS, GGUF_TYPES, write_checkpoint
from benchmark.machine import publish
from flexbatch import LLM, SamplingParams
from flexbatch.models.resolve import DEMO
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.stdout import run_process


def weight_files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf")]


def read_seconds(folder: Path) -> float:
    """To read all files in blocks of 16 MiB, four at a time."""

    def read(file: Path) -> None:
        with file.open("rb", buffering=0) as opened:
            buffer = bytearray(16 << 20)
            while opened.readinto(buffer):
                pass

    begun = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, weight_files(folder)))
    return time.perf_counter() - begun


def start(model: Path, offload: Path, weight_bits: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds from `LLM(...)` to weights that are where the plan wants them, and to a first answer."""
    prompt, params = [{"prompt_token_ids": list(range(5, 69))}], SamplingParams(max_tokens=1, ignore_eos=True)
    begun = time.perf_counter()
    with LLM(str(model), weight_bits=weight_bits, offload_dir=str(offload), **settings) as llm:
        llm.prepare(prompt, params)
        ready = time.perf_counter() - begun
        llm.generate(prompt, params)
        answered = time.perf_counter() - begun
        report = llm.report()
    return {
        "ready_seconds": round(ready, 2),
        "first_answer_seconds": round(answered, 2),
        "load_seconds": round(report["load_seconds"], 2),
        "loaded_bytes": report["loaded_bytes"],
        "reused_bytes": report["reused_bytes"],
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {} if args.gpu_memory is None else {"gpu_memory": args.gpu_memory}
    if args.percent is not None:
        settings["percent"] = tuple(args.percent)
    if args.hardware is not None:
        settings["hardware"] = args.hardware
    config = dict(SHAPES[args.model])
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    found = []
    for form in args.formats:
        folder = args.folder / f"{args.model}-{form}"
        shutil.rmtree(folder, ignore_errors=True)
        model = write_checkpoint(config, form, folder, device)
        size = sum(file.stat().st_size for file in weight_files(folder))
        row = {"model": args.model, "layers": config["num_hidden_layers"], "format": form, "bytes": size}
        row["read_seconds"] = round(read_seconds(folder), 2)
        own = {"tokenizer": str(DEMO)} if form in GGUF_TYPES else {}
        for bits in args.weight_bits if form == "bf16" else [BITS.get(form, 4)]:
            offload = args.folder / f"offload-{form}-{bits}"
            shutil.rmtree(offload, ignore_errors=True)
            for again in (False, True):
                figures = start(model, offload, bits, settings | own)
                rate = size / figures["ready_seconds"] / 1e9
                found.append(
                    {**row, "weight_bits": bits, "again": again, **figures, "gigabytes_per_second": round(rate, 2)}
                )
                print(found[-1], file=sys.stderr, flush=True)
            shutil.rmtree(offload, ignore_errors=True)
        shutil.rmtree(folder)
    return found


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
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish(lambda: {"starts": measure(args)}, args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
