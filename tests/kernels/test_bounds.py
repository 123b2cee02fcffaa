"""Kernels read nothing beyond their tensors: each argument ends where its memory does, before a page that nobody may
touch.

A read behind the end changes no result, so that no comparison shows it; on a GPU it is an illegal access once the
allocator has nothing there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import ctypes, itertools, mmap, sys
import torch
from flexbatch.kernels import attention, native
from tests.kernels.cases import Case

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(tensor):
    num_bytes = tensor.numel() * tensor.element_size()
    size = -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, size + mmap.PAGESIZE)
    kept.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    data = torch.frombuffer(region, dtype=torch.uint8)[size - num_bytes : size]
    copy = data.view(tensor.dtype).view(tensor.shape) if num_bytes else tensor
    return copy.copy_(tensor)

calls = {"triton": attention.paged_attention, "c": native.paged_attention}
call = calls[sys.argv[1]]
# The interpreter takes a second for a call.
several = itertools.product((16, 8, 4), (0, 7), (False, True)) if sys.argv[1] == "c" else [(16, 0, True), (4, 7, True)]
for bits, window, tree in several:
    for queries, contexts in (((3,), (21,)), ((5, 1, 19), (40, 17, 19)), ((1, 1), (33, 16))):
        sizes = (queries, contexts, 6, 2, 32, torch.float32, bits, 16, 16)
        case = Case(*sizes, window=window, tree=tree, seed=bits + window)
        arguments, options = case.build()
        expected = call(*arguments, **options)
        tensors = {name: guarded(value) for name, value in options.items() if isinstance(value, torch.Tensor)}
        options = options | tensors
        assert torch.equal(call(*(guarded(each) for each in arguments), **options), expected)
print("within bounds")
"""


@pytest.mark.parametrize("kernel", [pytest.param("triton", marks=pytest.mark.slow), "c"])
def test_nothing_is_read_behind_the_end_of_a_tensor(kernel: str) -> None:
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    words = [sys.executable, "-X", "faulthandler", "-c", SCRIPT, kernel]
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not run with this NumPy")
    assert done.returncode == 0 and "within bounds" in done.stdout, done.stderr[-3000:]
