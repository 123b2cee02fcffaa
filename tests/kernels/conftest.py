"""Triton kernels run in Triton's interpreter where there is no GPU, and on the GPU in the tests marked gpu."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Where a Triton kernel runs: interpreted on the CPU, or compiled on the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == ("cuda" if INTERPRETED else "cpu"):
        pytest.skip(f"TRITON_INTERPRET is {'' if INTERPRETED else 'not '}set")
    return torch.device(request.param)
