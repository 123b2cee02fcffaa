"""How many elements share a scale, and that the engine and the optimizer mean the same by it."""

import pytest

from flexbatch.policy.limits import cache_group, weight_group
from flexbatch.policy.shapes import public_shape


@pytest.mark.parametrize(
    ("hidden", "group"), [(60, 16), (256, 16), (768, 16), (1024, 32), (2047, 32), (2048, 64), (7168, 64)]
)
def test_weight_groups(hidden, group):
    assert weight_group(hidden) == group


@pytest.mark.parametrize(("head_dim", "group"), [(8, 16), (32, 16), (64, 32), (80, 32), (96, 32), (128, 64), (256, 64)])
def test_cache_groups(head_dim, group):
    assert cache_group(head_dim) == group


def test_bytes_follow_the_groups():
    small, large = public_shape("opt-125m"), public_shape("opt-30b")
    assert (
        small.weight_bytes(1 << 20, 4) == (1 << 20) * 6 // 8 and large.weight_bytes(1 << 20, 4) == (1 << 20) * 9 // 16
    )
    assert small.token_bytes(4) == 2 * 12 * (32 + 2 * 4) and large.token_bytes(4) == 2 * 56 * (64 + 2 * 4)
