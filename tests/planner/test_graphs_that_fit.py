"""What is said of a block that leaves no memory for CUDA graphs."""

from __future__ import annotations

import pytest

from flexbatch.planner.requirements import Graphs

CASES = [
    (Graphs(missing_bytes=3 << 20), "all passes"),
    (Graphs(2, missing_bytes=3 << 20), "passes with prompts"),
    (Graphs(4, (32, 64), missing_bytes=3 << 20), "passes of more than 64 tokens"),
]


@pytest.mark.parametrize(("graphs", "those"), CASES, ids=[those for _, those in CASES])
def test_the_log_says_what_is_launched_kernel_by_kernel_and_how_much_is_missing(graphs: Graphs, those: str) -> None:
    said = graphs.lack()
    assert said.startswith(f"{those} are launched kernel by kernel") and "3.000 MiB more of GPU memory" in said


def test_nothing_is_said_where_nothing_is_missing() -> None:
    assert not Graphs().lack() and not Graphs(16, (32, 64), 1 << 30).lack()
