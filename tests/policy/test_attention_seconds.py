"""The price of attention on a GPU, by the kernel that takes it: which heads have which is asked of the kernels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from flexbatch.policy.affine import point_of
from flexbatch.policy.attention_seconds import TILES_OVER_CODES, codes_slowdown, decode_seconds, prompt_seconds
from flexbatch.policy.cost import PassModel
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.limits import DECODING_APART, cache_group
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import public_shape

ALONE, TILED = np.asarray(False), np.asarray(True)
ON_GPU = Split(1, 0)


def shape_of(heads: int, kv_heads: int, head_dim: int) -> ModelShape:
    return ModelShape.from_sizes("a", 4, 2048, heads, 8192, 32000, num_kv_heads=kv_heads, head_dim=head_dim)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(32, 32, 64), (32, 32, 80), (32, 8, 128), (64, 8, 128), (71, 1, 64), (48, 1, 128), (16, 4, 96), (16, 16, 256)],
)
def test_heads_that_kernels_for_single_tokens_leave_to_tiles_cost_what_tiles_do(heads, kv_heads, head_dim, bits):
    kernels = pytest.importorskip("flexbatch.kernels.attention")
    from flexbatch.kernels import reference
    from flexbatch.kernels.attention_reference import AttentionOptions

    group = cache_group(head_dim)
    row = reference.token_bytes(kv_heads, head_dim, bits, group, 2)
    options = AttentionOptions(num_kv_heads=kv_heads, page_tokens=16, scale=1.0, bits=bits, group=group)
    fits = kernels.words_of(torch.empty(1, -(-row // 16) * 16, dtype=torch.uint8), torch.bfloat16, head_dim, options)
    if heads != kv_heads:
        fits = fits and kernels.grouped_fits(heads // kv_heads, head_dim, options)
    found = float(codes_slowdown(shape_of(heads, kv_heads, head_dim), load_hardware("h200"), ALONE))
    assert (found == 1.0) == fits
    assert found >= TILES_OVER_CODES or fits


def test_heads_of_80_are_attended_as_if_they_were_128():
    hardware, keys = load_hardware("h200"), np.asarray(1000.0)
    shape, whole = shape_of(32, 32, 80), shape_of(32, 32, 128)
    assert decode_seconds(shape, hardware, 16, keys, ALONE) == pytest.approx(
        float(decode_seconds(whole, hardware, 16, keys, ALONE))
    )
    assert decode_seconds(shape, hardware, 4, keys, ALONE) == pytest.approx(
        TILES_OVER_CODES * float(decode_seconds(whole, hardware, 4, keys, ALONE))
    )
    of_prompts = [float(prompt_seconds(each, hardware, 16, keys, keys)) for each in (shape, whole)]
    assert of_prompts[0] == pytest.approx(of_prompts[1])
    cpu = load_hardware("cpu")
    assert decode_seconds(shape, cpu, 16, keys, ALONE) < decode_seconds(whole, cpu, 16, keys, ALONE)


def test_layers_that_see_a_window_take_tiles():
    windowed = dataclasses.replace(shape_of(32, 8, 128), window=1024, window_layers=1)
    assert float(codes_slowdown(windowed, load_hardware("h200"), ALONE)) == pytest.approx((TILES_OVER_CODES + 3) / 4)


def gpu_seconds(policy: Policy, load: PassLoad) -> float:
    model = PassModel(public_shape("opt-1.3b"), load_hardware("h200"), policy, load)
    return float(np.max(model.resource_seconds(point_of(policy))["gpu_compute"]))


def test_few_sequences_beside_prompts_are_attended_by_their_tiles():
    """From `DECODING_APART` on they have a launch, and the kernel for single tokens, of their own."""
    policy = Policy(ON_GPU, ON_GPU, ON_GPU, 64, 1, cache_bits=4)
    few, many = (
        gpu_seconds(policy, PassLoad(decoding, 100_000.0, 64, 0.0, 2048, 1))
        for decoding in (DECODING_APART - 1, DECODING_APART)
    )
    assert few > many


def test_prompts_expand_a_quantized_cache_for_every_tile():
    shape, hardware, pairs = shape_of(32, 8, 64), load_hardware("h200"), np.asarray(1e6)
    plain, codes = (float(prompt_seconds(shape, hardware, bits, pairs, np.asarray(2e3))) for bits in (16, 4))
    assert codes > 1.5 * plain


def test_empty_places_of_a_graph_attend_what_its_first_sequence_does():
    """33 sequences of a graph of 64 take as long as 64 like them."""
    for bits in (16, 4):
        policy = Policy(ON_GPU, ON_GPU, ON_GPU, 64, 1, cache_bits=bits)
        short, full = (gpu_seconds(policy, PassLoad.decode(count, 400)) for count in (33, 64))
        assert short == pytest.approx(full)
        two = dataclasses.replace(policy, gpu_batch_size=32, num_gpu_batches=2)
        assert gpu_seconds(two, PassLoad.decode(33, 400)) < gpu_seconds(two, PassLoad.decode(64, 400)), "no graphs"


@pytest.mark.parametrize("bits", [8, 4])
def test_prompts_over_codes_take_what_they_were_measured_at(bits):
    """Beside their products: a beginning for each launch, and what tiles expand; as before where nobody measured."""
    before, pairs, tokens = load_hardware("h200"), np.asarray(64_000.0), np.asarray(1000.0)
    shape = shape_of(32, 8, 128)
    expanded = (64_000 + 32 * 1000) / 64 * 4 * shape.token_bytes(16)
    rates = {"prompt_expand_8": 2e12, "prompt_expand_4": 1e12}
    starts = {
        "prompt_start_seconds": 9e-3,
        "prompt_expand_8_start_seconds": 3e-5,
        "prompt_expand_4_start_seconds": 6e-5,
    }
    measured = dataclasses.replace(before, **rates, **starts)
    products = 4.0 * 32 * 128 * 64_000 / before.attention_prefill
    start, rate = (3e-5, 2e12) if bits == 8 else (6e-5, 1e12)
    found = float(prompt_seconds(shape, measured, bits, pairs, tokens, 2))
    assert found == pytest.approx(products + 2 * start + expanded / rate)
    assert float(prompt_seconds(shape, measured, bits, 0 * pairs, 0 * tokens, 2)) == 0
    assert float(prompt_seconds(shape, before, bits, pairs, tokens, 2)) == pytest.approx(
        products + expanded / before.quantized_attention * TILES_OVER_CODES
    )
    assert float(prompt_seconds(shape, measured, 16, pairs, tokens, 2)) == pytest.approx(products + 18e-3)
    assert float(prompt_seconds(shape, measured, 16, 0 * pairs, 0 * tokens, 2)) == 0
