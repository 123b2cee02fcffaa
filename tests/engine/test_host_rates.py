"""What the engine's Python costs: measured with passes that compute next to nothing, and told apart by their shapes."""

from __future__ import annotations

import pytest
import torch

from flexbatch import host_rates
from flexbatch.policy.types import Policy, Split

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_cost_is_found_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(num_layers: int, policy: Policy, device: torch.device) -> float:
        ticks = (num_layers + 1) * policy.num_gpu_batches
        more = 5e-4 * (policy.cpu_attention > 0) + 7e-4 * (not policy.overlap)
        more += policy.num_gpu_batches * (8e-4 * (policy.cache.cpu - policy.cpu_attention) + 9e-4 * policy.weights.cpu)
        return 2e-3 + 1e-5 * policy.block_size + 3e-4 * ticks + more * num_layers

    monkeypatch.setattr(host_rates, "decode_seconds", seconds)
    monkeypatch.setattr(host_rates, "attention_seconds", lambda device: 4e-4)
    monkeypatch.setattr(host_rates, "graph_seconds", lambda device: 4e-5)
    monkeypatch.setattr(host_rates, "attention_in_passes", lambda device, weights, calls: (6e-4, 1e11 + 2e10 * weights.gpu))
    found = host_rates.host_rates(torch.device(device))
    wanted = {
        "pass_seconds": 2e-3,
        "sequence_seconds": 1e-5,
        "launch_seconds": 3e-4,
        "graph_seconds": 4e-5 if device == "cuda" else 0.0,
        "exchange_seconds": 5e-4,
        "settle_seconds": 7e-4,
        "staging_seconds": 8e-4,
        "fetch_seconds": 9e-4,
        "cpu_attention_seconds": 6e-4 if device == "cuda" else 4e-4,
        **({"cpu_attention_during_h2d": 1e11, host_rates.ALONE: 1.2e11} if device == "cuda" else {}),
    }
    assert found == {name: pytest.approx(value) for name, value in wanted.items()}


def test_costs_of_this_machine() -> None:
    """Positive and below what any compute would take; the number of threads is as before."""
    threads = torch.get_num_threads()
    found = host_rates.host_rates(CPU)
    assert torch.get_num_threads() == threads
    assert 1e-6 < found["sequence_seconds"] < 1e-3 and 1e-5 < found["launch_seconds"] < 1e-2
    assert 1e-5 < found["cpu_attention_seconds"] < 0.1
    assert 0 <= found["pass_seconds"] < 0.05 and 0 <= found["exchange_seconds"] < 0.05 and 0 <= found["settle_seconds"] < 0.05


@pytest.mark.parametrize("weights", [host_rates.ON_CPU, host_rates.ON_GPU])
def test_attention_in_passes(weights: Split) -> None:
    """Calls of longer contexts take longer, at a rate that this machine's memory does not exceed."""
    fixed, rate = host_rates.attention_in_passes(CPU, weights, host_rates.AttentionCalls(4, 8, 3, (16, 256)))
    assert 0 <= fixed < 0.1
    assert 1e7 < rate < 1e12


def test_attention_is_measured_with_what_memory_there_is() -> None:
    """Weights of 2.7 GB and 0.15 GB for each pair of sequences, within a quarter."""
    sequences = [host_rates.AttentionCalls.for_memory(gib << 30).sequences for gib in (8, 16, 24, 32, 128)]
    assert sequences == sorted(sequences) and sequences[0] == 2 and sequences[-1] == host_rates.ATTENDED_SEQUENCES
    assert 2 < sequences[2] < sequences[-1]
