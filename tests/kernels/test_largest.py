"""The largest logit of a row, kept over the parts of a vocabulary: in Triton against torch, and torch's own maximum."""

import pytest
import torch

from flexbatch.kernels import reference

CASES = {"plain": None, "nan": torch.nan, "infinite": torch.inf, "barred": -torch.inf}


@pytest.fixture
def largest(device):
    from flexbatch.kernels import largest

    return largest


def rows_of(kind, dtype, columns):
    """Many equal logits: of so few values the largest is at many tokens."""
    logits = torch.randint(-3, 4, (7, columns)).to(dtype)
    if CASES[kind] is not None:
        logits[1, columns // 2] = logits[4, -1] = logits[5, 0] = CASES[kind]
        logits[6] = CASES[kind]
    return logits


def kept(operation, logits, cuts, device="cpu"):
    peaks = torch.full((len(logits),), -torch.inf, device=device)
    token_ids = torch.zeros(len(logits), dtype=torch.int64, device=device)
    for first, end in zip([0, *cuts], [*cuts, logits.shape[1]], strict=True):
        operation(logits[:, first:end].to(device), first, peaks, token_ids)
    return peaks.cpu(), token_ids.cpu()


@pytest.mark.parametrize("cuts", [(), (256, 512), (3, 4, 5000)], ids=str)
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_first_of_the_largest_stays(dtype, kind, cuts, largest, device):
    logits = rows_of(kind, dtype, 9001)
    wanted = kept(reference.keep_largest, logits, cuts)
    got = kept(largest.keep_largest, logits, cuts, device)
    for each in (wanted, got):
        peaks, token_ids = each
        most, tokens = logits.float().max(-1)
        torch.testing.assert_close(peaks, most, rtol=0, atol=0, equal_nan=True)
        finite = most.isfinite()
        assert torch.equal(token_ids[finite], tokens[finite])


def test_random_logits_in_a_wider_tensor(largest, device):
    logits = torch.randn(3, 40000).half()
    peaks, token_ids = torch.full((3,), -torch.inf, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    largest.keep_largest(logits.to(device)[:, 100:20101], 100, peaks, token_ids)
    assert torch.equal(token_ids.cpu(), logits[:, 100:20101].float().max(-1).indices + 100)
    largest.keep_largest(logits.to(device)[:0], 100, peaks[:0], token_ids[:0])
