"""How long models take to load: a checkpoint of random weights is written once for each of its formats, then opened.

    python -m benchmark.loading --model llama-3-8b --folder /tmp/checkpoints --output loading.json

Three starts for every format and number of bits: from the checkpoint with an empty offload folder, again with it (what
it holds is reused), and, first of all, the speed at which the files can be read by this machine's Python, in four
threads, since they were just written and lie in the page cache. Rates count bytes of the checkpoint. Shapes of Llama,
Mistral and Qwen 2 only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmark.machine import publish
from flexbatch import LLM, SamplingParams
from flexbatch.models.resolve import DEMO
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.stdout import run_process

GROUP = 128
"""Numbers that share a scale in the 4-bit checkpoint."""


def projections(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the linear modules of a layer."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def drawn_codes(rows: int, columns: int, device: str) -> torch.Tensor:
    """Eight 4-bit codes in every number."""
    return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32, device=device).cpu()


def layer_tensors(config: dict[str, Any], layer: int, bits: int, device: str) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in projections(config).items():
        module = f"model.layers.{layer}.{name}"
        if bits == 16:
            weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02
            made[f"{module}.weight"] = weight.cpu()
            continue
        made[f"{module}.qweight"] = drawn_codes(columns // 8, rows, device)
        made[f"{module}.qzeros"] = drawn_codes(columns // GROUP, rows // 8, device)
        made[f"{module}.scales"] = (torch.rand(columns // GROUP, rows) * 0.01 + 0.001).half()
        made[f"{module}.g_idx"] = torch.arange(columns, dtype=torch.int32) // GROUP
    for name in ("input_layernorm", "post_attention_layernorm"):
        made[f"model.layers.{layer}.{name}.weight"] = torch.ones(config["hidden_size"], dtype=torch.bfloat16)
    return made


def write_checkpoint(model: str, bits: int, folder: Path, device: str) -> int:
    """Returns its bytes. One file a layer, and one for embedding, last norm and head."""
    config = dict(SHAPES[model])
    folder.mkdir(parents=True)
    weights: dict[str, str] = {}
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    for layer in range(-1, config["num_hidden_layers"]):
        if layer < 0:
            tensors = {
                "model.embed_tokens.weight": torch.randn(vocabulary, hidden, dtype=torch.bfloat16),
                "lm_head.weight": torch.randn(vocabulary, hidden, dtype=torch.bfloat16) * 0.02,
                "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            }
        else:
            tensors = layer_tensors(config, layer, bits, device)
        file = f"model-{layer + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weights |= dict.fromkeys(tensors, file)
    if bits == 4:
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": False,
        }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **config}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def read_seconds(folder: Path) -> float:
    """To read all files in blocks of 16 MiB, four at a time."""

    def read(file: Path) -> None:
        with file.open("rb", buffering=0) as opened:
            buffer = bytearray(16 << 20)
            while opened.readinto(buffer):
                pass

    begun = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, folder.glob("*.safetensors")))
    return time.perf_counter() - begun


def start(folder: Path, offload: Path, weight_bits: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds from `LLM(...)` to weights that are where the plan wants them, and to a first answer."""
    prompt, params = [{"prompt_token_ids": list(range(5, 69))}], SamplingParams(max_tokens=1, ignore_eos=True)
    begun = time.perf_counter()
    with LLM(str(folder), weight_bits=weight_bits, offload_dir=str(offload), **settings) as llm:
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
    found = []
    for form in args.formats:
        folder = args.folder / f"{args.model}-{form}"
        shutil.rmtree(folder, ignore_errors=True)
        size = write_checkpoint(args.model, 4 if form == "gptq" else 16, folder, device)
        row = {"model": args.model, "format": form, "bytes": size, "read_seconds": round(read_seconds(folder), 2)}
        for bits in args.weight_bits if form == "bf16" else [4]:
            offload = args.folder / f"offload-{form}-{bits}"
            shutil.rmtree(offload, ignore_errors=True)
            for again in (False, True):
                figures = start(folder, offload, bits, settings)
                rate = size / figures["ready_seconds"] / 1e9
                found.append(
                    {**row, "weight_bits": bits, "again": again, **figures, "gigabytes_per_second": round(rate, 2)}
                )
                print(found[-1], file=sys.stderr)
            shutil.rmtree(offload, ignore_errors=True)
        shutil.rmtree(folder)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", choices=sorted(SHAPES))
    parser.add_argument("--formats", nargs="+", default=["bf16", "gptq"], choices=("bf16", "gptq"))
    parser.add_argument("--weight-bits", nargs="+", type=int, default=[16, 8, 4], choices=(16, 8, 4))
    parser.add_argument("--gpu-memory", help="the cap of the engine (default: what the GPU has)")
    parser.add_argument("--percent", type=float, nargs=6, help="a placement, instead of the chosen one")
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and offload files")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish(lambda: {"starts": measure(args)}, args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
