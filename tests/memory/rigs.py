"""Small tiers, transfer queues and architectures for the tests of memory and execution."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from flexbatch.memory.tiers import Pool, Tiers
from flexbatch.memory.transfer import ThreadQueue, TransferQueues
from flexbatch.models.arch import Arch
from flexbatch.models.families import read_arch
from flexbatch.models.specs import Piece, weight_specs
from flexbatch.policy.policy import Split
from flexbatch.trace import Tracer

MIB = 1 << 20


@contextmanager
def open_tiers(
    folder: Path, gpu: int = 64 * MIB, cpu: int = 64 * MIB, disk: int = 64 * MIB
) -> Iterator[tuple[Tiers, TransferQueues]]:
    """Pools of plain memory and the transfer queues between them; both are checked and closed at the end."""
    tiers = Tiers(Pool("gpu", gpu), Pool("cpu", cpu), Pool("disk", disk), folder)
    queues = TransferQueues(torch.device("cpu"), Tracer(), disk_threads=2)
    try:
        yield tiers, queues
        tiers.check()
        queues.check()
    finally:
        queues.close()
        tiers.close()


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Any split, with zeros and whole tiers as often as everything between."""
    parts = draw(st.tuples(*[st.one_of(st.just(0), st.integers(0, 1000))] * 3).filter(any))
    gpu, cpu = parts[0] / sum(parts), parts[1] / sum(parts)
    return Split(gpu, cpu, max(0.0, 1 - gpu - cpu))


def tiny_arch(num_layers: int = 2, tied: bool = False, **changes: object) -> Arch:
    """A Llama of awkward sizes."""
    sizes = {
        "hidden_size": 20,
        "intermediate_size": 36,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "vocab_size": 37,
    }
    config = {
        "model_type": "llama",
        "num_hidden_layers": num_layers,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
    }
    return read_arch({**config, **sizes, "eos_token_id": 2, "bos_token_id": 1, **changes})


def dawdle(queues: TransferQueues, seed: int, most: float = 0.002) -> None:
    """One job in eight starts up to ``most`` seconds late: whoever forgets to wait reads what is not there yet."""
    chance = random.Random(seed)
    for queue in queues.all_queues:
        assert isinstance(queue, ThreadQueue)

        def traced(*arguments: Any, traced: Callable[..., Any] = queue.traced) -> Any:
            if chance.random() < 1 / 8:
                time.sleep(chance.random() * most)
            return traced(*arguments)

        queue.traced = traced  # type: ignore[method-assign]


def pieces(arch: Arch, seed: int = 3) -> Iterator[Piece]:
    """Random weights, whole tensors, in the order of a pass."""
    generator = torch.Generator().manual_seed(seed)
    for spec in weight_specs(arch):
        yield Piece(spec.layer, spec.role, None, torch.randn(spec.shape, generator=generator))
