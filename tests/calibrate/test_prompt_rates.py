"""What attention of prompts takes on a GPU, told apart by short and long prompts over 16, 8 and 4 bits."""

from __future__ import annotations

import pytest
import torch

from flexbatch.calibrate import kernels
from flexbatch.policy.attention_seconds import tile_keys

HEADS, ROW_BYTES = 32, 2 * 32 * 128 * 2


@pytest.fixture
def prompts_take(monkeypatch):
    """Has 8 prompts of a length over a cache of so many bits take what a function says."""

    def told(seconds):
        def rows(num_tokens, heads, dtype, device, bits=16):
            assert heads == HEADS
            return torch.empty(num_tokens, 0)

        def call(rows, query_tokens, context, heads, dtype, bits=16):
            assert query_tokens == context and len(rows) == kernels.PROMPTS * context and heads == (HEADS, HEADS)
            return context, bits

        monkeypatch.setattr(kernels, "cache_rows", rows)
        monkeypatch.setattr(kernels, "attention_call", call)
        monkeypatch.setattr(kernels, "seconds", lambda call, device: seconds(*call))
        return kernels.prompt_rates(torch.device("cpu"), torch.bfloat16)

    return told


def flops(length: int) -> float:
    return HEADS * kernels.prompt_flops(kernels.PROMPTS, length)


def loaded(length: int) -> float:
    return ROW_BYTES * kernels.PROMPTS * float(tile_keys(length * (length + 1) / 2, length))


def test_rates_and_beginnings_are_found_again(prompts_take):
    def seconds(length: int, bits: int) -> float:
        if bits == 16:
            return 1e-5 + flops(length) / 2e14
        start, rate = (2e-5, 3e12) if bits == 8 else (6e-5, 1e12)
        return flops(length) / 2e14 + start + loaded(length) / rate

    assert prompts_take(seconds) == {
        "attention_prefill": pytest.approx(2e14),
        "prompt_start_seconds": pytest.approx(1e-5),
        "prompt_expand_8": pytest.approx(3e12),
        "prompt_expand_8_start_seconds": pytest.approx(2e-5),
        "prompt_expand_4": pytest.approx(1e12),
        "prompt_expand_4_start_seconds": pytest.approx(6e-5),
    }


@pytest.mark.parametrize("times", [(1e-4, 1e-4), (2e-4, 1e-4), (1e-6, 1e-2), (1e-9, 1e-9)])
def test_whatever_was_measured_rates_are_positive_and_beginnings_are_not_negative(times, prompts_take):
    found = prompts_take(lambda length, bits: times[length == kernels.CONTEXT])
    assert all(value >= 0 if name.endswith("_seconds") else value > 0 for name, value in found.items())
    # What was measured with long prompts comes out again.
    took = found["prompt_start_seconds"] + flops(kernels.CONTEXT) / found["attention_prefill"]
    assert took == pytest.approx(times[1])
