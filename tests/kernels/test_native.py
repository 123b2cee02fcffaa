"""Building the compiled kernels, and doing without; writing token rows in C."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flexbatch.kernels import native, reference
from flexbatch.kernels.native_sizes import workspace_bytes
from tests.kernels.cases import Case, assert_same_rows, awkward

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 70), st.sampled_from([16, 8, 4]), st.integers(1, 80),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([1.0, 1e-6, 1e4]),
    st.integers(0, 99),
)  # fmt: skip
def test_append_rows_bit_for_bit(tokens, heads, head_dim, bits, group, dtype, size, seed):
    random = torch.Generator().manual_seed(seed)
    key, value = ((torch.randn(tokens, heads, head_dim, generator=random) * size).to(dtype) for _ in range(2))
    key[0] = 1.25  # a constant group
    slots = torch.randperm(9, generator=random)[:tokens]
    row_bytes = reference.token_bytes(heads, head_dim, bits, group, dtype.itemsize)
    wanted = (
        torch.zeros((9, 2, heads, head_dim), dtype=dtype)
        if bits == 16
        else torch.zeros((9, row_bytes), dtype=torch.uint8)
    )
    got = wanted.clone()
    reference.append_rows(wanted, slots, key, value, bits, group)
    native.append_rows(got, slots, key, value, bits, group)
    assert torch.equal(got, wanted)


@needs_compiler
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_append_rows_of_what_arithmetic_treats_apart(dtype, bits):
    """A NaN stays one, wherever in its group it is; so do infinities, zeros and the smallest numbers."""
    for seed, (heads, head_dim, group) in enumerate([(2, 64, 16), (1, 33, 8), (3, 20, 64), (2, 7, 1)] * 6):
        key, value = (awkward(dtype, (8, heads, head_dim), group, 2 * seed + side) for side in range(2))
        row_bytes = reference.token_bytes(heads, head_dim, bits, group, dtype.itemsize)
        wanted = (
            torch.zeros((9, 2, heads, head_dim), dtype=dtype)
            if bits == 16
            else torch.zeros((9, row_bytes), dtype=torch.uint8)
        )
        got, slots = wanted.clone(), torch.randperm(9)[:8]
        reference.append_rows(wanted, slots, key, value, bits, group)
        native.append_rows(got, slots, key, value, bits, group)
        assert_same_rows(got, wanted, heads, head_dim, bits, group, dtype)
        back = torch.stack(reference.unpack_rows(got[slots], heads, head_dim, bits, group, dtype))
        lost = torch.stack([key, value]).isnan()
        assert back[lost].isnan().all()


@needs_compiler
def test_append_rows_takes_slices_of_a_fused_projection():
    fused = torch.randn(6, 5 * 3 * 16)
    key, value = fused[:, 48:96].view(6, 3, 16), fused[:, 96:144].view(6, 3, 16)
    wanted, got, slots = torch.zeros(8, 2, 3, 16), torch.zeros(8, 2, 3, 16), torch.tensor([7, 0, 3, 2, 5, 1])
    reference.append_rows(wanted, slots, key, value)
    native.append_rows(got, slots, key, value)
    assert torch.equal(got, wanted)


@needs_compiler
def test_rows_that_are_too_narrow_are_refused():
    """They would be written beyond their end."""
    key, rows = torch.ones(1, 8, 128), torch.zeros(4, 1088, dtype=torch.uint8)
    with pytest.raises(AssertionError, match=r"8 heads of 128 at 4 bits takes 1280 bytes, these have 1088"):
        native.append_rows(rows, torch.zeros(1, dtype=torch.int64), key, key, 4, 64)


@needs_compiler
def test_built_once(tmp_path):
    first = native.build(tmp_path)
    written = first.stat().st_mtime_ns
    assert native.build(tmp_path) == first
    assert first.stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [first.name], "no temporary files stay"


def test_without_a_compiler_the_oracle_serves_after_one_warning(tmp_path):
    code = (
        "import warnings, torch; from flexbatch.kernels import native, ops\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        print(ops.paged_attention(torch.ones(1, 1, 4), torch.ones(4, 2, 1, 4), torch.zeros(1, 1).int(), "
        "torch.tensor([0, 1]),"
        " torch.tensor([2]), num_kv_heads=1, page_tokens=4, scale=1.0).tolist())\n"
        "print(len([w for w in seen if 'no C compiler' in str(w.message)]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        check=False,
    )
    assert result.stdout.split("\n")[:3] == ["[[[1.0, 1.0, 1.0, 1.0]]]", "[[[1.0, 1.0, 1.0, 1.0]]]", "1"], result.stderr


@needs_compiler
def test_an_unwritable_cache_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(native.BuildError, match=r"file/cache.*make it writable"):
        native.build(tmp_path / "file" / "cache")


class Workspaces(TorchDispatchMode):
    """Sizes of the byte tensors that calls make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.uint8:
            self.sizes.append(result.numel())
        return result


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 1500)), min_size=1, max_size=6), st.integers(1, 8),
    st.integers(1, 16), st.integers(1, 140) | st.sampled_from([32, 64, 128]),
    st.integers(1, 5), st.sampled_from([0, 50]), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_call_takes_no_more_than_is_planned_for_it(lengths, kv_heads, group, head_dim, threads, window, dtype):
    queries = [max(1, count) if i == 0 else count for i, (count, _) in enumerate(lengths)]
    contexts = [max(1, count) + prefix for count, (_, prefix) in zip(queries, lengths, strict=True)]
    (query, rows, *positions), options = Case(
        tuple(queries), tuple(contexts), kv_heads * group, kv_heads, head_dim, dtype, window=window
    ).build()
    with Workspaces() as seen:
        native.paged_attention(query, rows, *positions, **options, threads=threads)
    planned = workspace_bytes(
        kv_heads * group, kv_heads, head_dim, len(queries), sum(queries), max(queries), max(contexts), threads
    )
    assert seen.sizes[-1] <= planned


def test_what_many_sequences_take_is_bounded_by_the_threads():
    """32 heads of 128 elements, trees of 32 nodes over 2,048 keys: 16.6 MiB of partial results for each of them
    once, and for all at the same time. Of fewer nodes, whose items have all heads, it is 7.6 MiB."""
    sizes = [workspace_bytes(32, 32, 128, sequences, 32 * sequences, 32, 2048, 4) for sequences in (1, 5, 64)]
    assert sizes[0] < 11 << 20 and sizes[2] - sizes[1] < 59 * 32 * 1024
    assert sizes[2] < 48 << 20  # all at the same time: 1 GiB
