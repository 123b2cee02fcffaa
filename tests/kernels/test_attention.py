"""Paged attention of the compiled C and of Triton against the oracle."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels import attention_reference, native, ops
from tests.kernels.cases import CASES, TOLERANCE, Case

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def shared_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of shared heads over codes takes more than engines give it."""
    if find_spec("triton") is not None:
        monkeypatch.setattr("flexbatch.kernels.attention.MAX_SHARED", 16)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, products: torch.dtype | None = None) -> None:
    """products: the dtype that operands are rounded to, where it is not that of the result."""
    assert got.dtype == wanted.dtype
    tolerance = TOLERANCE[products or wanted.dtype]
    torch.testing.assert_close(got.float().cpu(), wanted.float(), atol=tolerance, rtol=tolerance)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_native(case, dtype):
    arguments, options = replace(case, dtype=dtype).build()
    assert_close(
        native.paged_attention(*arguments, **options), attention_reference.paged_attention(*arguments, **options)
    )


@needs_compiler
@pytest.mark.parametrize(
    "options", [{}, {"window": 100}, {"tree": True}, {"bits": 4}, {"num_heads": 32}, {"sinks": True}], ids=str
)
def test_native_cuts_shorter_where_rows_are_wider(options):
    """16 heads of 128 elements: 128 keys in one piece, not 512."""
    case = replace(
        Case((1, 3, 1, 1, 33), (300, 131, 128, 129, 400), num_heads=16, num_kv_heads=16, head_dim=128), **options
    )
    arguments, others = case.build()
    assert_close(
        native.paged_attention(*arguments, **others), attention_reference.paged_attention(*arguments, **others)
    )


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 300}, {"window": 300, "chunked": True}, {"sinks": True}, {"sinks": True, "window": 300}],
    ids=str,
)
def test_native_cuts_long_contexts(options):
    arguments, options = Case(
        (1, 4, 17, 1), (1025, 600, 1600, 512), num_heads=6, num_kv_heads=2, head_dim=40, **options
    ).build()
    assert_close(
        native.paged_attention(*arguments, **options), attention_reference.paged_attention(*arguments, **options)
    )


IN_TILES = {"num_heads": 24, "num_kv_heads": 3, "head_dim": 64, "dtype": torch.bfloat16}


@needs_compiler
@pytest.mark.parametrize(
    "heads",
    [{"head_dim": 32}, {"num_heads": 16, "num_kv_heads": 16, "head_dim": 128}, IN_TILES],
    ids=["narrow", "wide", "in tiles"],
)
def test_native_result_depends_on_the_sequence_alone(heads):
    """Bit for bit, whatever the number of threads and the neighbors in the batch."""
    (query, rows, table, starts, lens), options = Case((1, 3, 1), (700, 90, 1100), **heads).build()
    together = [
        native.paged_attention(query, rows, table, starts, lens, **options, threads=threads) for threads in (1, 3)
    ]
    alone = native.paged_attention(query[4:], rows, table[2:], torch.tensor([0, 1]), lens[2:], **options)
    assert torch.equal(together[0], together[1])
    assert torch.equal(together[0][4:], alone)


@st.composite
def random_cases(draw) -> Case:
    queries = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any))
    contexts = [max(1, q) + draw(st.integers(0, 70)) for q in queries]
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    flags = {name: draw(st.booleans()) for name in ("alibi", "tree", "sinks")}
    return Case(
        tuple(queries), tuple(contexts), kv_heads * group, kv_heads, draw(st.integers(1, 70)),
        bits=draw(st.sampled_from([16, 8, 4])),
        group=draw(st.integers(1, 80)), page_tokens=draw(st.integers(1, 20)), window=draw(st.sampled_from([0, 1, 9])),
        soft_cap=draw(st.sampled_from([0.0, 2.0])), seed=draw(st.integers(0, 99)), **flags,
    )  # fmt: skip


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(random_cases())
def test_native_on_random_cases(case):
    arguments, options = case.build()
    assert_close(
        native.paged_attention(*arguments, **options), attention_reference.paged_attention(*arguments, **options)
    )


@st.composite
def cases_in_tiles(draw) -> Case:
    """Up to 16 query rows of a group, and contexts of one piece and of several."""
    group = draw(st.integers(3, 16))
    queries = draw(st.lists(st.integers(1, 16 // group), min_size=1, max_size=4))
    contexts = [q + draw(st.integers(0, 600)) for q in queries]
    kv_heads, window = draw(st.integers(1, 3)), draw(st.sampled_from([0, 0, 1, 40]))
    bits, codes = draw(st.sampled_from([16, 16, 8, 4])), draw(st.sampled_from([32, 64]))
    return Case(
        tuple(queries), tuple(contexts), kv_heads * group, kv_heads, draw(st.sampled_from([32, 64, 96, 128])),
        torch.bfloat16, bits, codes, page_tokens=draw(st.integers(1, 40)), window=window,
        chunked=window > 0 and draw(st.booleans()), alibi=draw(st.booleans()), sinks=draw(st.booleans()),
        soft_cap=draw(st.sampled_from([0.0, 2.0])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(cases_in_tiles())
def test_native_in_bfloat16_is_rounded_once(case):
    """Where the processor has matrix tiles, they take these; weights that were rounded to bfloat16 for them would give
    other results in one of four places. Quantized keys and values are rounded before."""
    arguments, options = case.build()
    got = native.paged_attention(*arguments, **options)
    if case.bits != 16:
        assert_close(got, attention_reference.paged_attention(*arguments, **options))
        return
    wanted = attention_reference.paged_attention(
        *(x.float() if x.dtype == torch.bfloat16 else x for x in arguments), **options
    )
    torch.testing.assert_close(got.float(), wanted, atol=1e-4, rtol=2**-8)
    assert (got != wanted.bfloat16()).float().mean() < 0.03


INTERPRETED_LATER = {
    ("trees, window of 32, in chunks", 1),
    *(("trees, window of 40", 1), ("trees, window of 200", 1), ("trees, window of 64, soft cap", 1)),
    *(
        ("trees, window of 100, ALiBi", 1),
        ("trees with rounded ALiBi", 1),
        ("trees", 3),
        ("4 bits", 3),
        ("sinks, window", 3),
    ),
}
"""Two seconds each in the interpreter; every option of theirs is in another case."""


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        pytest.param(name, splits, marks=pytest.mark.slow if (name, splits) in INTERPRETED_LATER else ())
        for names, splits in (
            (CASES, 1),
            (
                (
                    "decode",
                    "window",
                    "trees",
                    "4 bits",
                    "decode, 4 bits",
                    "sinks, window",
                    "sinks, decode, 4 bits",
                    "shared decode, 4 bits",
                    "shared decode, 8 bits",
                ),
                3,
            ),
        )
        for name in names
    ],
)
def test_triton(name, splits, device):
    from flexbatch.kernels import attention

    case = CASES[name]
    arguments, options = case.build()
    wanted = attention_reference.paged_attention(*arguments, **options)
    arguments, options = case.build(device)
    products = torch.bfloat16 if name.startswith("shared decode") and device.type == "cuda" else None
    assert_close(attention.paged_attention(*arguments, **options, splits=splits), wanted, products)


@pytest.mark.parametrize("splits", [1, 3])
def test_wide_tiles_of_long_contexts(splits, device):
    """By the bound that a caller gives: these contexts end within a tile."""
    from flexbatch.kernels import attention

    case, bounds = Case((1, 1, 1), (300, 7, 129), dtype=torch.float16), {"max_query_len": 1, "max_context_len": 4096}
    assert attention.choose_launch(case.dtype, case.head_dim, 16, 2, 4096).block_n == 128
    assert attention.choose_launch(case.dtype, case.head_dim, 16, 2, 500).block_n == 64
    assert attention.choose_launch(case.dtype, case.head_dim, 4, 2, 4096).block_n == 64
    arguments, options = case.build()
    wanted = attention_reference.paged_attention(*arguments, **options)
    arguments, options = case.build(device)
    assert_close(attention.paged_attention(*arguments, **options | bounds, splits=splits), wanted)


def test_triton_looks_pages_up_once(device):
    from flexbatch.kernels import attention

    for name in ("chunks, no groups", "window", "mixed, many heads of one"):
        arguments, options = CASES[name].build()
        wanted = attention_reference.paged_attention(*arguments, **options)
        arguments, options = CASES[name].build(device)
        assert_close(
            attention.paged_attention(*arguments, **options, launch=attention.AttentionLaunch(32, 32, 4, 1)),
            wanted,
        )


@pytest.mark.parametrize("splits", [1, 3])
def test_scores_in_the_thousands(splits, device):
    """Every part subtracts its maximum before the exponential."""
    from flexbatch.kernels import attention

    arguments, options = (case := Case((1, 4), (90, 70), head_dim=16)).build()
    wanted = attention_reference.paged_attention(*arguments, **options | {"scale": 300.0})
    if native.library() is not None:
        torch.testing.assert_close(
            native.paged_attention(*arguments, **options | {"scale": 300.0}), wanted, atol=1e-3, rtol=1e-3
        )
    arguments, options = case.build(device)
    got = attention.paged_attention(*arguments, **options | {"scale": 300.0}, splits=splits)
    torch.testing.assert_close(got.cpu(), wanted, atol=1e-3, rtol=1e-3)


def test_triton_reads_a_slice_of_a_fused_projection(device):
    from flexbatch.kernels import attention

    (query, *rest), options = CASES["decode"].build(device)
    fused = torch.cat([query.flatten(1), torch.full((len(query), 40), float("nan"), device=device)], dim=1)
    part = fused[:, : query[0].numel()].view(query.shape)
    assert part.stride(0) > query.stride(0)
    assert torch.equal(
        attention.paged_attention(part, *rest, **options, splits=1),
        attention.paged_attention(query, *rest, **options, splits=1),
    )


def test_sinks_are_softmax_over_one_more_key():
    """Against the definition: a key of that score whose value is zero, in plain arithmetic."""
    (query, rows, table, starts, lens), options = Case((3,), (20,), head_dim=8, sinks=True).build()
    slots = (table[0].long()[:, None] * 8 + torch.arange(8)).flatten()[:20]
    found = attention_reference.paged_attention(query, rows, table, starts, lens, **options)
    for token, head in ((0, 0), (1, 2), (2, 3)):
        keys, values = (rows[slots[: 18 + token], side, head // 2] for side in (0, 1))
        weights = (keys @ query[token, head] * 8**-0.5).exp()
        wanted = (weights @ values) / (weights.sum() + options["sinks"][head].exp())
        torch.testing.assert_close(found[token, head], wanted, atol=1e-5, rtol=1e-5)


def test_triton_refuses_what_it_cannot_read():
    from flexbatch.kernels import attention

    arguments, options = Case((1,), (9,), head_dim=48, bits=4, group=24).build()
    with pytest.raises(ValueError, match=r"power of two.*groups of 24"):
        attention.paged_attention(*arguments, **options)


def test_splits_fill_the_chip_and_no_more():
    from flexbatch.kernels import attention

    assert attention.choose_splits(programs=4000, max_context_len=100_000, multiprocessors=132) == 1
    assert attention.choose_splits(programs=8, max_context_len=1000, multiprocessors=132) == 4
    assert attention.choose_splits(programs=8, max_context_len=100_000, multiprocessors=132) == attention.MAX_SPLITS
    assert attention.choose_splits(programs=100, max_context_len=100_000, multiprocessors=132) == 4


SHARED = Case((1, 1, 1, 1, 0, 1), (1, 15, 64, 700, 3, 1030), num_kv_heads=4, page_tokens=16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "group"), [(128, 64), (64, 32), (64, 64), (256, 128), (32, 16)])
@pytest.mark.parametrize("shared", [2, 4, 7, 8, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_shared_heads_over_codes(bits, shared, head_dim, group, dtype):
    """In products of bfloat16, which the interpreter lacks: rounding is that of bfloat16, also where queries are of
    float16."""
    from flexbatch.kernels import attention

    case = replace(SHARED, bits=bits, num_heads=4 * shared, head_dim=head_dim, group=group, dtype=dtype)
    arguments, options = case.build()
    wanted = attention_reference.paged_attention(*arguments, **options).float()
    arguments, options = case.build("cuda")
    for splits in (1, 4):
        got = attention.paged_attention(*arguments, **options, splits=splits).float().cpu()
        torch.testing.assert_close(got, wanted, atol=TOLERANCE[torch.bfloat16], rtol=TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
def test_triton_in_a_cuda_graph():
    """A replay sees new lengths and new queries: nothing of the first call is baked in but the bounds."""
    from flexbatch.kernels import attention

    (query, rows, table, starts, lens), options = Case(
        (1, 1, 1), (20, 900, 300), head_dim=128, dtype=torch.bfloat16
    ).build("cuda")
    options |= {"max_query_len": 1, "max_context_len": 900}
    attention.paged_attention(query, rows, table, starts, lens, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.paged_attention(query, rows, table, starts, lens, **options)
    query.copy_(torch.randn_like(query))
    lens.copy_(torch.tensor([3, 700, 250]))
    graph.replay()
    wanted = attention_reference.paged_attention(*(x.cpu() for x in (query, rows, table, starts, lens)), **options)
    assert_close(out, wanted)


def test_ops_choose_by_device():
    arguments, options = CASES["trees"].build()
    assert_close(
        ops.paged_attention(*arguments, **options, threads=1),
        attention_reference.paged_attention(*arguments, **options),
    )
