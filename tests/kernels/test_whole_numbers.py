"""Whole numbers, against Triton's."""

import pytest

from flexbatch.kernels.whole_numbers import ceil_div, next_power_of_2


def test_as_triton_has_them():
    triton = pytest.importorskip("triton")
    numbers = [*range(1, 300), 1023, 1024, 1025, 2**31 - 1, 2**40 + 1]
    assert [next_power_of_2(x) for x in numbers] == [triton.next_power_of_2(x) for x in numbers]
    pairs = [(x, y) for x in (0, *numbers) for y in (1, 2, 3, 64, 1000)]
    assert [ceil_div(*pair) for pair in pairs] == [triton.cdiv(*pair) for pair in pairs]
