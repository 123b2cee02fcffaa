"""How fast this machine's processor computes experts where they lie: bytes of weights a second, by their format and the
rows that an expert is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexbatch.calibrate.fits import fit_curve
from flexbatch.calibrate.links import Timer
from flexbatch.kernels import mxfp4_reference, ops, reference
from flexbatch.kernels.experts_reference import StoredExperts, StoredMatrices
from flexbatch.kernels.native_experts import ExpertTable
from flexbatch.memory.host_memory import host_memory_bytes
from flexbatch.memory.tiers import HostArena, touch_pages
from flexbatch.policy.curve import Curve

HIDDEN, WIDTH, GROUP = 2048, 768, 64
"""Of one expert: those of Qwen3-30B-A3B."""
FORMS = ("16", "8", "4", "mxfp4")
ROWS = (1, 4, 16, 64, 256)
"""That every expert is given in a measurement."""
SECONDS = {"cuda": 0.1, "cpu": 0.08}
MOST_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Of weights in a measurement: more than the processor's own caches hold."""
CACHED_ROWS = 8
"""From so many on an expert computes longer than its weights take to come, wherever from: a quarter of the bytes does.
With all of them these measurements took 9 of 55 s of a profile on an H200's machine."""
COMPUTED_ROWS = 64
"""From so many on it is the rows alone that take time, whatever the form of the weights: no more experts of fewer bits
than of 16. With four times as many of 4 bits, a call was 0.27 TFLOP and one of these measurements a second."""


def repeated(drawn: Tensor, count: int) -> Tensor:
    """``count`` rows in host memory of the engine's own kind, huge pages and all: they are touched by all cores, where
    an H200's host gave new pages of another kind at 1.2 GB/s."""
    arena = HostArena(count * drawn[0].nbytes, pinned=False)
    touch_pages(arena.tensor)
    whole = arena.tensor.view(drawn.dtype).view(count, *drawn.shape[1:])
    for part in whole.split(len(drawn)):
        part.copy_(drawn[: len(part)])
    return whole


def stored_matrices(
    form: str, count: int, outputs: int, inputs: int, dtype: torch.dtype, group: int = GROUP
) -> StoredMatrices:
    """Random matrices of ``count`` experts. Those of a few experts are drawn and repeated, which nothing can tell."""

    def of_all(drawn: Tensor) -> dict[int, Tensor]:
        return dict(enumerate(repeated(drawn, count)))

    few = min(count, 2)
    if form == "16":
        return StoredMatrices(of_all((torch.randn(few, outputs, inputs) / inputs**0.5).to(dtype)))
    bits = 8 if form == "8" else 4
    codes = of_all(torch.randint(256, (few, outputs, reference.code_bytes(inputs, bits)), dtype=torch.uint8))
    if form == "mxfp4":
        block = mxfp4_reference.BLOCK
        scales = of_all(torch.full((few, outputs, inputs // block), 120, dtype=torch.uint8))
        return StoredMatrices(codes, scales, bits, block, floats=True)
    parameters = torch.full((few, outputs, reference.num_groups(inputs, group), 2), 2.0**-8, dtype=dtype)
    return StoredMatrices(codes, of_all(parameters), bits, group)


def stored_experts(form: str, count: int, hidden: int, width: int, dtype: torch.dtype) -> ExpertTable:
    """A layer's experts in a form, of `expert_bytes` each."""
    gate_up, down = (
        stored_matrices(form, count, outputs, inputs, dtype)
        for outputs, inputs in ((2 * width, hidden), (hidden, width))
    )
    return ExpertTable.of(StoredExperts(gate_up, down, hidden, width), count)


def expert_bytes(form: str, hidden: int, width: int, dtype: torch.dtype) -> int:
    """Of one expert's weights in a form."""
    shapes = (2 * width, hidden), (hidden, width)
    if form == "16":
        return sum(outputs * inputs for outputs, inputs in shapes) * dtype.itemsize
    bits, total = 8 if form == "8" else 4, 0
    for outputs, inputs in shapes:
        scales = inputs // mxfp4_reference.BLOCK
        parameters = scales if form == "mxfp4" else 2 * dtype.itemsize * reference.num_groups(inputs, GROUP)
        total += outputs * (reference.code_bytes(inputs, bits) + parameters)
    return total


def expert_curves(device: torch.device, dtype: torch.dtype) -> dict[str, Curve]:
    """Fields of `policy.hardware.Hardware`. MXFP4 counts as 4 bits: a core with AVX2 reached 2.3 GB/s, and 2.5 with
    those."""
    total = min(MOST_BYTES[device.type], host_memory_bytes() // 16)
    timer, curves = Timer(torch.device("cpu"), SECONDS[device.type]), {}
    plain = 3 * HIDDEN * WIDTH * dtype.itemsize
    for form, name in (("16", "cpu_experts"), ("8", "cpu_experts_8"), ("4", "cpu_experts_4")):
        each = expert_bytes(form, HIDDEN, WIDTH, dtype)
        count = max(1, total // each)
        table = stored_experts(form, count, HIDDEN, WIDTH, dtype)
        counts = [used_experts(rows, count, total // plain) for rows in ROWS]
        rates = [
            used * each / timer(call_of(table, rows, dtype, count=used))
            for rows, used in zip(ROWS, counts, strict=True)
        ]
        # More rows do not make the bytes come faster: the regression runs from the most to one.
        falling, _ = fit_curve(ROWS, rates[::-1])
        curves[name] = Curve(falling.points, falling.values[::-1])
    return curves


def used_experts(rows: int, count: int, plain_count: int) -> int:
    """Of ``count`` in a measurement that gives each so many rows. plain_count: as many as weigh the same in 16 bits."""
    if rows < CACHED_ROWS:
        return count
    return max(1, (count if rows < COMPUTED_ROWS else min(count, plain_count)) // 4)


def call_of(
    table: ExpertTable, rows: int, dtype: torch.dtype, threads: int = 0, count: int | None = None
) -> Callable[[], object]:
    """Every expert of the table, or the first ``count``, is given so many rows."""
    hidden = table.stored.hidden
    experts = torch.arange(len(table.addresses) if count is None else count).repeat(rows)
    x = torch.randn(min(64, len(experts)), hidden).to(dtype).repeat(-(-len(experts) // 64), 1)[: len(experts)]
    tokens = torch.arange(len(experts))
    return lambda: ops.expert_rows(x, tokens, experts, table, threads=threads)
