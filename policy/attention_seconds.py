"""Seconds of attention on a GPU, by the kernel that a cache and its heads have: the profile measures heads of 128
elements that nothing shares, single tokens over 16 and 4 bits and prompts over 16, 8 and 4."""

from __future__ import annotations

import numpy as np

from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import cache_group
from flexbatch.policy.model_shape import ModelShape

TILES_OVER_CODES = 2.4
"""As long as the kernels for single tokens over codes take tiles of a tensor core, which expand codes to operands: on
an H200 2.1 times at 8 and 2.3 at 4 bits (OPT-30B, 64 x 512 keys), on an H100 1.8 and 2.4 (Llama-3-8B, 64 x 4,096)."""
TILE_ROWS, TILE_KEYS = 64, 64
"""Query rows for which a program expands the codes that they see, and keys that it takes together."""
MAX_SHARED = 8
"""Query heads that share one of a quantized cache and have a kernel for single tokens, at most."""
KEYS_OF_SEQUENCE = {16: 16, 8: 24, 4: 24}
"""By bits of the cache: keys that the CPU attends in the time that a sequence takes it besides. One of 16, 48, 128 and
512 keys takes a core 17, 35, 70 and 265 us over 16 bits (8 heads of 128 for 32 of queries), and 25, 46, 86 and 327 over
8. An H200's host attended 239 sequences of 45 keys over 8 bits for 53 ms a pass, and 37 were planned."""


def padding(shape: ModelShape, hardware: Hardware) -> float:
    """Of a head that is no power of two tiles compute and load the next one: 1.6 for 80 elements. Graphs of OPT-2.7B
    with 16 bits took an H200 0.07 to 0.1 ms a layer more than by their bytes, and 1.6 times the bytes is that."""
    if hardware.device != "cuda" or shape.cache_sides == 1:
        return 1.0
    return (1 << (shape.head_dim - 1).bit_length()) / shape.head_dim


def codes_slowdown(shape: ModelShape, hardware: Hardware, tiled: np.ndarray) -> np.ndarray:
    """As often as long as by ``attention_expand`` takes a single token over codes in the mean layer. tiled: whether it
    is attended in one launch with prompts."""
    if hardware.device != "cuda" or shape.cache_sides == 1:
        return np.ones_like(tiled, dtype=float)
    tiles = TILES_OVER_CODES * padding(shape, hardware)
    shared, group = shape.num_heads / shape.num_kv_heads, cache_group(shape.head_dim)
    fits = padding(shape, hardware) == 1 and (shared == 1 or (shared <= MAX_SHARED and shape.head_dim <= 2 * group))
    windowed = shape.window_layers / shape.num_layers
    alone = tiles * windowed + (1 - windowed) if fits else tiles
    return np.where(tiled, tiles, alone)


def decode_seconds(
    shape: ModelShape, hardware: Hardware, cache_bits: int, keys: np.ndarray, tiled: np.ndarray
) -> np.ndarray:
    """Of a layer whose single tokens see so many keys together."""
    stored, whole = shape.token_bytes(cache_bits) * keys, shape.token_bytes(16) * keys
    reading = stored / hardware.attention_decode
    if cache_bits == 16:
        return np.asarray(reading * padding(shape, hardware))
    # Expanding rows inside attention costs instructions, more than the bytes that it saves.
    expanding = whole / hardware.quantized_attention * codes_slowdown(shape, hardware, tiled)
    return np.maximum(reading, expanding)


def prompt_seconds(
    shape: ModelShape, hardware: Hardware, cache_bits: int, pairs: np.ndarray, tokens: np.ndarray, launches: int = 1
) -> np.ndarray:
    """Of a layer whose prompt tokens see so many keys, each its own, in so many launches: their beginnings, products,
    and where the cache is quantized expanding it for every tile of query rows, whose last tile of keys is half
    empty."""
    flops = 4.0 * shape.num_heads * shape.head_dim * pairs
    products = flops / hardware.attention_prefill * padding(shape, hardware)
    begun = launches * (np.asarray(tokens) > 0)
    if cache_bits == 16 or hardware.device != "cuda" or shape.cache_sides == 1:
        return np.asarray(products + begun * hardware.prompt_start_seconds)
    measured = hardware.prompt_expand_8 if cache_bits == 8 else hardware.prompt_expand_4
    rate = measured or hardware.quantized_attention / TILES_OVER_CODES
    start = hardware.prompt_expand_8_start_seconds if cache_bits == 8 else hardware.prompt_expand_4_start_seconds
    read = expanded_for_prompts(shape, pairs, tokens) * padding(shape, hardware)
    return np.asarray(products + begun * start + read / rate)


def expanded_for_prompts(shape: ModelShape, pairs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Bytes, counted at 16 bits."""
    return tile_keys(pairs, tokens) * shape.num_heads / shape.num_kv_heads * shape.token_bytes(16)


def tile_keys(pairs: float | np.ndarray, tokens: float | np.ndarray) -> np.ndarray:
    """Keys that tiles of query rows load together, of prompt tokens whose heads share none and see so many."""
    return np.asarray((pairs + TILE_KEYS / 2 * tokens) / TILE_ROWS)
