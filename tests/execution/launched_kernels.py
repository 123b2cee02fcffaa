"""``python -m tests.execution.launched_kernels``: kernels that passes of tiny jobs would launch on a GPU and that were
not announced, as JSON. A process of its own: Triton decides at import whether kernels are interpreted, and an imagined
GPU wants a process for itself.

Jobs run on the CPU. Whatever they ask of `kernels.ops` is asked once more over tensors of an imagined GPU, of the same
shapes, strides and offsets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flexbatch import LLM, SamplingParams
from flexbatch.kernels import native_coded, ops
from flexbatch.kernels.imagined_gpu import DEVICE, GpuTraits, Launch, imagined_gpu
from flexbatch.kernels.launched import LaunchedKernel
from flexbatch.memory.weight_plan import PlacedTensor
from flexbatch.models import experts, shapes
from flexbatch.planner import planner
from flexbatch.planner.choose import Choice
from flexbatch.planner.loader import planned_kernels
from flexbatch.policy.limits import CODED_PASS_TOKENS, CODED_TOKENS

TRAITS = GpuTraits(90, 12, 232448)
"""Few multiprocessors, so that tiny jobs fill them or do not."""
OPERATIONS = (
    *("paged_attention", "append_rows", "latent_attention", "append_latent_rows", "dequantize", "linear"),
    *("expand_mxfp4", "gather_pages", "scatter_rows", "rms_norm", "layer_norm", "rotary", "gated_activation"),
    *("clamped_gate", "keep_largest"),
)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,  # the others launch the same
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "grouped": LLAMA,
    "own heads": {**LLAMA, "num_key_value_heads": 4},
    "odd heads": {**LLAMA, "head_dim": 80, "num_key_value_heads": 4},
    "wide heads": {**LLAMA, "head_dim": 256, "num_attention_heads": 2},
    "windows": {**LLAMA, "model_type": "mistral", "sliding_window": 40},
    "biases": {
        **{name: LLAMA[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
        **{"model_type": "opt", "ffn_dim": 192, "word_embed_proj_dim": 128, "max_position_embeddings": 1024},
    },
    "experts": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
OF_CODES = {"coded_linear_kernel", "coded_gemm_kernel"}
SHORT, FEW = [3, 5, 9, 70, 17, 33, 40, 4, 120, 61] * 4, [300, 2, 700]
STREAMED = {"percent": (50, 50, 50, 50, 100, 0), "gpu_batch_size": 8, "num_gpu_batches": 2, "cpu_attention": 0.0}
WHOLE = {"percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": 40, "num_gpu_batches": 1, "prefill_chunk": 256}
JOBS: tuple[tuple[tuple[int, int], list[list[int]], dict[str, Any]], ...] = (
    ((16, 16), [SHORT, FEW], WHOLE),
    ((8, 8), [SHORT, FEW], WHOLE),
    ((4, 4), [SHORT, FEW], WHOLE),
    ((8, 16), [SHORT[:20]], {**STREAMED, "prefill_chunk": 32}),
    ((4, 16), [SHORT[:20]], {**STREAMED, "few_in_codes": False}),
    ((16, 4), [SHORT[:8]], {**WHOLE, "draft": ("ngram",), "tree": "chain:4"}),
)
"""Bits of weights and cache, the prompts of jobs one after the other, and settings; ``few_in_codes`` is none of these:
a plan for a GPU may have it so."""


def imagined(x: Any) -> Any:
    """With every tensor on the imagined GPU."""
    if isinstance(x, Tensor):
        end = 1 + x.storage_offset() + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
        memory = torch.empty(max(1, end), dtype=x.dtype, device=DEVICE)
        return memory.as_strided(x.shape, x.stride(), x.storage_offset())
    if dataclasses.is_dataclass(x) and not isinstance(x, type | PlacedTensor):
        return dataclasses.replace(x, **{each.name: imagined(getattr(x, each.name)) for each in dataclasses.fields(x)})
    if isinstance(x, tuple | list):
        return type(x)(map(imagined, x))
    return x


def form_of(x: Any) -> object:
    """All that imagined tensors keep of ``x``: the layers of a pass ask for the same."""
    if isinstance(x, Tensor):
        return x.dtype, tuple(x.shape), x.stride(), x.storage_offset()
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [form_of(getattr(x, each.name)) for each in dataclasses.fields(x)]
    if isinstance(x, dict):
        return {name: form_of(value) for name, value in x.items()}
    return [form_of(each) for each in x] if isinstance(x, tuple | list) else x


class Listener:
    """Notes what operations would launch."""

    def __init__(self) -> None:
        self.launched: dict[Launch, Launch] = {}
        self.asked: set[str] = set()
        self.lock, self.within = threading.RLock(), threading.local()
        """``within.one``: what an operation asks of others on the CPU is nothing that a GPU launches."""

    def heard(self, operation: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            here = {name: value for name, value in options.items() if name != "threads"}
            form = f"{operation.__name__} {form_of((*arguments, here))}"
            with self.lock:
                if form not in self.asked and not getattr(self.within, "one", False):
                    self.asked.add(form)
                    with imagined_gpu(TRAITS) as found:
                        operation(*map(imagined, arguments), **{name: imagined(value) for name, value in here.items()})
                    self.launched.update(found)
            before, self.within.one = getattr(self.within, "one", False), True
            try:
                return operation(*arguments, **options)
            finally:
                self.within.one = before

        return call

    def listen(self) -> None:
        for name in OPERATIONS:
            setattr(ops, name, self.heard(getattr(ops, name)))
        experts.expert_mlp = self.heard(experts.expert_mlp)
        shapes.config_of = MODELS.__getitem__
        native_coded.most_tokens = lambda dtype: CODED_TOKENS  # as on a GPU


def planned_with(few_in_codes: bool) -> Any:
    """In the place of what chooses that."""

    def chosen(problem: Any, choice: Choice, known: Any) -> Choice:
        policy = dataclasses.replace(choice.policy, few_in_codes=few_in_codes)
        return dataclasses.replace(choice, policy=policy)

    return chosen


def unannounced(model: str, jobs: list[list[int]], settings: dict[str, Any], listener: Listener) -> list[str]:
    """What a job launches beside what its plan announces; and products of few tokens in codes where it has none."""
    few_in_codes = settings.pop("few_in_codes", True)
    planner.with_faster_products = planned_with(few_in_codes)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"gpu_memory": "256MiB", "cpu_memory": "256MiB", "offload_dir": folder}
        options = {"dummy_weights": True, "device": "cpu", "dtype": "bfloat16", "hardware": "cpu", **sizes, **settings}
        with LLM(model, **options) as llm:
            llm.weights.coded_pass_tokens = CODED_PASS_TOKENS
            listener.launched.clear()
            listener.asked.clear()
            for lengths in jobs:
                prompts = [
                    {"prompt_token_ids": [3 + (7 * i + j) % 300 for j in range(n)]} for i, n in enumerate(lengths)
                ]
                params = [
                    SamplingParams(max_tokens=2 + i % 5, temperature=0, ignore_eos=True) for i in range(len(lengths))
                ]
                llm.generate(prompts, params)
            announced = planned_kernels(llm.engine_plan)
    launched = dict(listener.launched)
    with imagined_gpu(TRAITS) as found, noted() as not_kept:
        announced.launch(announced.what)
    assert launched, "nothing was launched"
    in_codes = settings["weight_bits"] < 16 and few_in_codes
    names = {each.name for each in found}
    assert names.isdisjoint(OF_CODES) if not in_codes else names.issuperset(OF_CODES), (names, settings)
    return [f"{each.name} {each.forms} {each.options}" for each in launched if each not in found] + sorted(not_kept)


@contextlib.contextmanager
def noted() -> Iterator[set[str]]:
    """Kernels that the body launches so that Triton looks for their program every time. Within `imagined_gpu`."""
    launch, names, found = LaunchedKernel.launch, set[str](), set[str]()

    def note(kernel: Any, grid: Any, *given: Any, **named: Any) -> None:
        names.add(kernel.function.__name__)
        if kernel.constants(len(given), named) is None:
            found.add(f"{kernel.function.__name__}: not kept for {len(given)} arguments and {sorted(named)}")
        launch(kernel, grid, *given, **named)

    LaunchedKernel.launch = note  # type: ignore[method-assign]
    try:
        yield found
    finally:
        LaunchedKernel.launch = launch  # type: ignore[method-assign]
    assert len(names) > 3, names


def main(names: list[str]) -> None:
    listener, missing = Listener(), {}
    listener.listen()
    for name in MODELS:
        if names and name not in names:
            continue
        for (bits, cache_bits), jobs, settings in JOBS:
            given = {**settings, "weight_bits": bits, "cache_bits": cache_bits}
            if found := unannounced(name, jobs, given, listener):
                missing[f"{name}, {bits}/{cache_bits} bits, {settings}"] = found
    print(json.dumps(missing, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
