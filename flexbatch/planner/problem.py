"""What a policy is chosen for, in the optimizer's terms: sizes of the model, lengths of the job, and what is fixed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.memory.weight_plan import by_piece, placed_tensor, tensor_format
from flexbatch.models.arch import Arch
from flexbatch.models.lora.adapter_set import AdapterSet
from flexbatch.models.quantized.scheme import Form
from flexbatch.models.specs import weight_specs
from flexbatch.policy.candidates import Known
from flexbatch.policy.expert_shape import ExpertShape
from flexbatch.policy.limits import weight_group
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.policy import Constraints, Policy
from flexbatch.policy.workload import Workload
from flexbatch.validation.errors import ConfigurationError


@dataclass(frozen=True)
class Problem:
    """What a policy is chosen for. ``budgets``: bytes by tier. In a pipeline, one stage, and the part of the job that
    one of as many parts of the block runs."""

    arch: Arch
    config: EngineConfig
    job: Job
    budgets: dict[str, int]
    element_bytes: int
    prequantized: Mapping[str, Form] = field(default_factory=dict)
    """Forms by role of a checkpoint that is quantized already."""
    loaded: Policy | None = None
    """The policy whose weights and bits are in memory and stay as they are."""
    adapters: AdapterSet | None = None
    whole_requests: int | None = None
    """Of the job of which this is one part's."""
    known: Known = field(default_factory=Known, compare=False)
    """What searches for it have computed; a problem that differs in its budgets or in the bits of its cache alone may
    have it, too."""

    def __post_init__(self) -> None:
        if self.arch.latent is not None and self.config.cpu_attention:
            heads, width = self.arch.num_heads, self.arch.latent.width
            raise ConfigurationError(
                f"cpu_attention={self.config.cpu_attention:g}: {self.arch.family} has latent attention, whose rows of "
                f"{width} numbers are multiplied with {heads} heads each: that is work for the compute device; leave "
                "cpu_attention out"
            )
        if self.config.cpu_experts and (self.arch.shard or self.arch.stage):
            raise ConfigurationError(
                f"cpu_experts={self.config.cpu_experts:g}: several ranks share the cores, and only an engine of one "
                "GPU leaves experts to them; leave cpu_experts out, or tensor_parallel_size and pipeline_parallel_size"
            )
        if self.config.cpu_experts and self.arch.experts is None:
            raise ConfigurationError(
                f"cpu_experts={self.config.cpu_experts:g}: {self.arch.family} has no experts; leave cpu_experts out"
            )

    @property
    def cpu_attention(self) -> float | None:
        """The share that is fixed. None of latent attention: a byte of its cache takes as many operations as there are
        heads, and the link carries it sooner than the CPU attends it."""
        return self.config.cpu_attention if self.arch.latent is None else 0.0

    @property
    def cpu_experts(self) -> float | None:
        """The share that is fixed. None for a model without experts, and where several processes share the cores."""
        if self.arch.experts is None or self.arch.shard is not None or self.arch.stage is not None:
            return 0.0
        return None if self.config.cpu_experts is None else self.config.cpu_experts / 100

    @cached_property
    def workload(self) -> Workload:
        return dataclasses.replace(workload_of(self.job), whole_sequences=self.whole_requests)

    @cached_property
    def shape(self) -> ModelShape:
        bits, adapters = self.config.weight_bits, self.adapters
        return model_shape(self.config.model, self.arch, self.element_bytes, bits, self.prequantized, adapters)

    @property
    def stored_bits(self) -> int | None:
        """Bits of the weights of a checkpoint that is quantized already."""
        return max((form.bits for form in self.prequantized.values()), default=None)

    @property
    def percent(self) -> tuple[float | None, ...] | None:
        """The six numbers that are fixed, by the user or because the weights are loaded."""
        if self.config.percent is not None or self.loaded is None:
            return self.config.percent
        return (100 * self.loaded.weights.gpu, 100 * self.loaded.weights.cpu, None, None, None, None)

    @property
    def is_fixed(self) -> bool:
        """Whether the user left nothing to choose."""
        config = self.config
        sizes = (
            config.percent,
            config.gpu_batch_size,
            config.num_gpu_batches,
            self.cpu_attention,
            config.prefill_chunk,
            config.prefill_budget,
        )
        return None not in sizes and not config.allow_bits


def model_shape(
    name: str,
    arch: Arch,
    element_bytes: int,
    bits: int = 16,
    prequantized: Mapping[str, Form] | None = None,
    adapters: AdapterSet | None = None,
) -> ModelShape:
    """The sizes of all tensors in placement order. Of tied embeddings the table belongs to the head, which ships it.

    ``prequantized`` roles of a checkpoint keep their own forms, and with them every matrix beside them is
    stored at ``bits`` already.
    """
    specs = list(weight_specs(arch))
    group = weight_group(arch.hidden_size)
    sparse = [layer for layer in range(arch.num_layers) if arch.experts_of(layer)]
    dense = [layer for layer in range(arch.num_layers) if layer not in set(sparse)]
    # The layer that the cost knows best: one with experts, where there are any.
    typical, other = (sparse or dense)[0], dense[0] if sparse and dense else None

    def stored(layer: int | None) -> tuple[int, ...]:
        forms = {spec: tensor_format(spec, bits, group, prequantized or {}) for spec in specs if spec.layer == layer}
        sizes = ((spec, placed_tensor(spec, "gpu", form, element_bytes).num_bytes) for spec, form in forms.items())
        return tuple(by_piece(sizes).values()) if prequantized else ()

    def elements(layers: Iterable[int | None]) -> tuple[int, ...]:
        sizes = (
            (spec, math.prod(spec.shape))
            for spec in specs
            if spec.layer in layers and not (spec.role == "embed.weight" and arch.tie_word_embeddings)
        )
        return tuple(by_piece(sizes).values())

    table = tuple(math.prod(spec.shape) for spec in specs if spec.role == "embed.weight" and arch.tie_word_embeddings)
    adapted = {layer: adapters.elements_outside(layer) if adapters else () for layer in (-1, arch.num_layers)}
    return ModelShape(
        name=name,
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        intermediate_size=arch.intermediate_size,
        vocab_size=arch.vocab_size,
        block_tensors=elements((typical,)),
        head_tensors=(*table, *elements((arch.num_layers,)), *adapted[arch.num_layers]),
        embedding_tensors=(*elements((-1,)), *adapted[-1]),
        mlp_matrices=3 if arch.mlp == "gated" else 2,
        element_bytes=element_bytes,
        stored_block_bytes=stored(typical),
        experts=_expert_shape(arch),
        dense_layers=len(dense) if sparse else 0,
        dense_tensors=elements((other,)),
        stored_dense_bytes=stored(other),
        cache_sides=arch.cache_sides,
        head_width=0 if arch.latent is None else arch.latent.head_width,
        adapter_tensors=() if adapters is None else adapters.elements_of_a_layer(),
        stages=1 if arch.stage is None else arch.stage.stages,
        **_window_of(arch),
    )


def _window_of(arch: Arch) -> dict[str, Any]:
    layers = sum(arch.window_layers)
    return {
        "window": arch.sliding_window if layers else 0,
        "window_layers": layers,
        "window_chunked": arch.chunked_window,
    }


def _expert_shape(arch: Arch) -> ExpertShape | None:
    experts = arch.experts
    return ExpertShape(experts.count, experts.top_k, experts.width, experts.shared_width) if experts else None


def workload_of(job: Job) -> Workload:
    """Lengths as the cost model counts them: the last generated token needs no row of the cache."""
    expected, prompt = np.asarray(job.expected_tokens), np.asarray(job.prompt_tokens)
    workload = Workload.from_lengths(np.maximum(1, prompt), np.maximum(1, expected - prompt + 1))
    most = float((np.asarray(job.cache_tokens) - prompt).max() + 1) if job.likely_tokens else None
    return dataclasses.replace(workload, grows=bool(job.likely_tokens), most_output=most)


def constraints_of(problem: Problem, capacity: dict[str, int], block: tuple[int, int] | None = None) -> Constraints:
    """Returns what the search may vary: settings of the user are fixed, and ``block`` fixes its sizes, too.
    Bits are chosen only among --allow-bits."""
    config, loaded = problem.config, problem.loaded

    def bits(name: str, stored: int | None) -> tuple[int, ...]:
        given: int = getattr(config, name)
        if loaded is not None:
            return (getattr(loaded, name),)
        if stored is not None:
            return (stored,)
        return tuple(config.allow_bits) if config.allow_bits and given == 16 else (given,)

    return Constraints(
        percent=problem.percent,
        gpu_batch_size=block[0] if block else config.gpu_batch_size,
        num_gpu_batches=block[1] if block else config.num_gpu_batches,
        cpu_attention=problem.cpu_attention,
        cpu_experts=problem.cpu_experts,
        prefill_chunk=config.prefill_chunk,
        prefill_budget=config.prefill_budget,
        weight_bits=bits("weight_bits", problem.stored_bits),
        cache_bits=bits("cache_bits", None),
        overlap=config.overlap,
        async_scheduling=config.goes_ahead is not False and not config.draft,
        piece_tokens=config.piece_tokens,
        gpu_memory=capacity["gpu"],
        cpu_memory=capacity["cpu"],
        disk=capacity["disk"],
    )
