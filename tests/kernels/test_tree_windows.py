"""Random trees, windows, page sizes and bits: the compiled C and Triton against the oracle in float32, within what
their arithmetic may differ by."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from flexbatch.kernels import attention_reference, native, reference
from tests.kernels.cases import Case

WHOLE, PART, SAMPLE = 3000, 150, 60
WIDE = (torch.float32, torch.bfloat16, torch.float16)
slow = pytest.mark.slow

# Heads, groups of heads, elements, page, group of codes. A GPU compiles a kernel for each and for every set of options,
# so that they are few.
LAYOUTS = ((4, 2, 64, 16, 64), (6, 1, 24, 8, 16), (3, 3, 128, 1, 32), (8, 2, 40, 20, 16))
OPTIONS: tuple[dict[str, Any], ...] = ({}, {}, {"soft_cap": 3.0}, {"alibi": True}, {"alibi": True, "alibi_scale": 0.2})


def random_window(rng: random.Random, page_tokens: int, contexts: list[int]) -> int:
    """None, one key, less than a page, a page, about as many as a tree has nodes, and up to the whole context."""
    return rng.choice(
        [
            0,
            1,
            2,
            max(1, page_tokens - 1),
            page_tokens,
            7,
            rng.randint(1, 40),
            64,
            rng.randint(1, max(contexts)),
            max(contexts),
            1000,
        ]
    )


def random_lengths(
    rng: random.Random, most_sequences: int, most_queries: int, most_keys: int
) -> tuple[list[int], list[int]]:
    """Query tokens and contexts: no token, one, a tree, one that is wider than a tile, with a prefix of no key up to
    several splits."""
    queries = [
        rng.choice([0, 1, 2, rng.randint(1, 33), rng.randint(1, most_queries)])
        for _ in range(rng.randint(1, most_sequences))
    ]
    queries[rng.randrange(len(queries))] = rng.randint(1, most_queries)
    return queries, [
        max(1, count) + rng.choice([0, rng.randint(0, 40), rng.randint(0, most_keys)]) for count in queries
    ]


def native_case(seed: int) -> Case:
    rng = random.Random(seed)
    queries, contexts = random_lengths(rng, 4, 100, 1300)
    kv_heads, page_tokens = rng.randint(1, 3), rng.choice([1, 3, 8, 16, 20])
    return Case(
        tuple(queries), tuple(contexts), kv_heads * rng.choice([1, 1, 2, 3, 8]), kv_heads,
        rng.choice([8, 16, 33, 64, rng.randint(1, 140)]), rng.choice(WIDE),
        rng.choice([16, 8, 4]), rng.choice([8, 16, 64, rng.randint(1, 80)]), page_tokens,
        window=random_window(rng, page_tokens, contexts),
        tree=rng.random() < 0.9, seed=seed, **rng.choice(OPTIONS),
    )  # fmt: skip


def triton_case(seed: int, on_gpu: bool) -> tuple[Case, int]:
    """And into how many splits the context is cut. The interpreter takes bfloat16 for what it is not, and a second
    for a tree."""
    number = seed // PART  # one layout and one set of options for each part
    heads, kv_heads, head_dim, page_tokens, group = LAYOUTS[number % 4]
    dtype = WIDE[number // 2 % 3] if on_gpu else (torch.float32, torch.float16)[number // 2 % 2]
    rng = random.Random(seed)
    queries, contexts = random_lengths(rng, 4, 100, 1300) if on_gpu else random_lengths(rng, 2, 40, 50)
    case = Case(
        tuple(queries), tuple(contexts), heads, kv_heads, head_dim, dtype, (16, 8, 4)[number % 3], group, page_tokens,
        window=random_window(rng, page_tokens, contexts), tree=True, seed=seed, **OPTIONS[number % 5],
    )  # fmt: skip
    return case, (1, 3)[number % 2]


def unrounded(rows: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of token rows in float32, quantized ones with all bits that their codes and parameters say."""
    if case.bits == 16:
        return rows[:, 0].float(), rows[:, 1].float()
    codes, groups = reference.code_bytes(case.head_dim, case.bits), reference.num_groups(case.head_dim, case.group)
    vectors = 2 * case.num_kv_heads
    parameters = (
        rows[:, vectors * codes :][:, : vectors * groups * 2 * case.dtype.itemsize]
        .clone()
        .view(case.dtype)
        .view(-1, vectors, groups, 2)
    )
    both = reference.dequantize(
        rows[:, : vectors * codes].reshape(-1, vectors, codes), parameters.float(), case.head_dim, case.bits, case.group
    )
    return both[:, : case.num_kv_heads], both[:, case.num_kv_heads :]


def assert_as_exact(
    got: torch.Tensor,
    case: Case,
    arguments: tuple[torch.Tensor, ...],
    options: dict[str, Any],
    expanded_in_float32: bool = False,
) -> None:
    """The oracle in float32 over the keys and values as the kernel expands them, to the dtype or to float32. A
    weight and a result may each be rounded to the dtype once: the error is that share of the weighted magnitudes of
    the values, and of the result. float32 itself rounds sums and exponentials."""
    query, rows, *positions = arguments
    key, value = unrounded(rows, case)
    if not expanded_in_float32:
        key, value = (x.to(case.dtype).float() for x in (key, value))
    wide = options | {"bits": 16}
    exact, size = (
        attention_reference.paged_attention(query.float(), torch.stack([key, each], 1), *positions, **wide)
        for each in (value, value.abs())
    )
    unit = torch.finfo(case.dtype).eps / 2 if case.dtype != torch.float32 else 0.0
    allowed = 1.01 * unit * (size + exact.abs()) + 4e-6 * (1 + size)
    excess = (got.cpu().float() - exact).abs() - allowed
    assert not excess.isnan().any() and excess.max() <= 0, (
        f"{case}: {float(excess.max()):.3g} beyond the rounding of {case.dtype}"
    )


@pytest.mark.skipif(native.library() is None, reason="no C compiler")
@pytest.mark.parametrize(
    "seeds", [range(SAMPLE), *(pytest.param(range(i, i + PART), marks=slow) for i in range(0, WHOLE, PART))], ids=str
)
def test_native(seeds):
    for case in map(native_case, seeds):
        arguments, options = case.build()
        assert_as_exact(native.paged_attention(*arguments, **options), case, arguments, options, True)


@pytest.mark.parametrize(
    "seeds",
    [range(0, WHOLE, 1000), *(pytest.param(range(i, i + PART), marks=slow) for i in range(0, WHOLE, PART))],
    ids=str,
)
def test_triton(seeds, device):
    from flexbatch.kernels import attention

    on_gpu = device.type == "cuda"
    for case, splits in (triton_case(seed, on_gpu) for seed in (seeds if on_gpu or seeds.step > 1 else seeds[::10])):
        arguments, options = case.build()
        on_device, moved = case.build(device)
        assert_as_exact(attention.paged_attention(*on_device, **moved, splits=splits), case, arguments, options)


@pytest.mark.parametrize("heads", [2, 8], ids=["few rows", "many rows"])
@pytest.mark.parametrize("last", ["deepest", "shallowest"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.skipif(native.library() is None, reason="no C compiler")
def test_a_tree_whose_last_node_is_shallow(bits, last, heads):
    """Five drafted tokens and, from another draft, one that follows the root: the deeper ones must not see what lies
    before their window, wherever that begins in a block of 32 keys."""
    case = Case((7,), (700,), heads, 2, 32, bits=bits, page_tokens=16, tree=True)
    arguments, options = case.build()
    parents = (-1, 0, 1, 2, 3, 4, 0) if last == "shallowest" else (-1, 0, 0, 2, 3, 4, 5)
    depths, masks = [0] * 7, [1] * 7
    for node in range(1, 7):
        depths[node], masks[node] = depths[parents[node]] + 1, masks[parents[node]] | 1 << node
    options |= {
        "tree_masks": torch.tensor(masks).int().unsqueeze(1),
        "positions": torch.tensor([693 + depth for depth in depths]).int(),
    }
    for window in range(40, 73):
        options["window"] = window
        assert_as_exact(native.paged_attention(*arguments, **options), case, arguments, options, True)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.skipif(native.library() is None, reason="no C compiler")
def test_what_sees_a_nan_is_one(side, window, bits):
    """An overflow of a layer must reach the logits: every query token whose keys hold a NaN gives NaN, in one head
    of them here."""
    case = Case(
        (3, 20), (50, 90), num_heads=4, num_kv_heads=2, head_dim=16, bits=bits, group=16, window=window, page_tokens=8
    )
    (query, rows, table, starts, lens), options = case.build()
    key, value = torch.randn(2, 1, 2, 16)
    (key if side == "key" else value)[0, 1, 5] = torch.nan
    for sequence, context in enumerate(case.contexts):
        native.append_rows(rows, case.slots_of(table[sequence], context)[-3:-2], key, value, bits, 16)
    got = native.paged_attention(query, rows, table, starts, lens, **options)
    for end in starts[1:].tolist():
        assert got[end - 3 : end, 2:].isnan().any(-1).all() and not got[end - 3 : end, :2].isnan().any()
