"""The gated MLPs of a mixture of experts in Triton: as many launches for 512 experts as for one, wherever their
matrices lie and in whatever codes, and the host waits for nothing.

T: tokens, K: experts of each, R = T x K routed rows; H: hidden size, W: width of an expert, E: experts. The oracle is
`experts.by_loop`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flexbatch.kernels import expert_kernels
from flexbatch.kernels.expert_codes import GatedActivation, Units, form_of, is_even, shape_of


@dataclass(frozen=True)
class ExpertLaunch:
    """Shape of a tile: rows of a matrix, tokens, and bytes of a matrix' row in a step (inputs of 16 bits: half as
    many); warps and stages of a program."""

    rows: int = 128
    tokens: int = 16
    step: int = 64
    warps: int = 4
    stages: int = 4


TOKENS = (16, 32, 64, 128)
"""Tokens of a tile: the least that the mean expert fits."""
TOGETHER = 8
"""Tiles that go through a matrix side by side."""
BLOCK_TILES = 32
PLAIN = {
    16: ExpertLaunch(128, 16, 128, 4, 4),
    32: ExpertLaunch(128, 32, 128, 4, 4),
    64: ExpertLaunch(128, 64, 128, 4, 4),
    128: ExpertLaunch(128, 128, 128, 8, 3),
}
CODED = {
    16: ExpertLaunch(128, 16, 64, 4, 3),
    32: ExpertLaunch(128, 32, 64, 4, 3),
    64: ExpertLaunch(128, 64, 64, 8, 3),
    128: ExpertLaunch(128, 128, 64, 8, 3),
}


@dataclass(frozen=True)
class ExpertTable:
    """Where the matrices of all experts of a layer lie. addresses: [2, E] int64 on their device, of each matrix or its
    codes, and of their parameters (0: none). ``units`` are what it points into."""

    units: Units
    addresses: Tensor

    @property
    def num_experts(self) -> int:
        return self.addresses.shape[1]


def table_of(units: Units) -> ExpertTable:
    """The table of matrices that lie where they are; made once, since it is copied from the host."""
    addresses = []
    for _, matrices in sorted(units, key=lambda unit: unit[0]):
        parts = [matrices] if isinstance(matrices, Tensor) else [matrices.codes, matrices.parameters]
        for part in parts:
            assert part.is_contiguous() and part.data_ptr() % 16 == 0, (part.stride(), part.data_ptr())
        for index in range(len(parts[0])):
            addresses.append([part[index].data_ptr() for part in parts] + [0] * (2 - len(parts)))
    device = (units[0][1] if isinstance(units[0][1], Tensor) else units[0][1].codes).device
    return ExpertTable(units, torch.tensor(addresses).t().contiguous().to(device))


def multiplies(x: Tensor, units: Units) -> bool:
    """Whether the kernels can: codes in groups of a power of two, and of an even number of inputs at 4 bits."""
    form = form_of(units)
    columns = shape_of(units)[1]
    if form.bits == 16:
        return True
    return form.group & (form.group - 1) == 0 and form.group * form.bits // 8 >= 16 and columns % (8 // form.bits) == 0


def launch_of(rows: int, num_experts: int, bits: int) -> ExpertLaunch:
    """By the mean number of tokens of an expert, which the host knows."""
    mean = rows / max(1, min(rows, num_experts))
    tokens = next((size for size in TOKENS if mean <= size), TOKENS[-1])
    return (PLAIN if bits == 16 else CODED)[tokens]


def halves(x: Tensor) -> Tensor:
    """[rows, size] with all even columns before all odd ones."""
    return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)


def expert_mlp(
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    gate_up: ExpertTable,
    down: ExpertTable,
    gate: GatedActivation,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    launch: ExpertLaunch | None = None,
) -> Tensor:
    """Sum over the experts ``chosen`` [T, K] of ``shares`` [T, K] times down(gate(gate_up)) of x [T, H]: [T, H].
    ``launch``: that of `launch_of` unless given."""
    rows, top_k = chosen.numel(), chosen.shape[1]
    out = torch.empty_like(x)
    if not rows:
        return out
    launch = launch or launch_of(rows, gate_up.num_experts, form_of(gate_up.units).bits)
    order, tiles = tiles_of(chosen.flatten(), gate_up.num_experts, launch.tokens)
    inner = gate_up_rows(x, order, tiles, gate_up, biases[0], gate, is_even(down.units), launch)
    routed = down_rows(inner, order, tiles, down, biases[1], launch)
    block = min(1024, triton.next_power_of_2(x.shape[1]))
    expert_kernels.weighted_kernel[len(x), triton.cdiv(x.shape[1], block)](
        routed, shares.contiguous(), out, x.shape[1], CHOICES=top_k, BLOCK=block
    )
    return out


def tiles_of(experts: Tensor, num_experts: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert [R], and the tiles of at most ``tokens`` of them [as many as there may be, 3]: expert or
    -1, first row, end of the expert's rows."""
    ordered, order = experts.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(num_experts, device=experts.device), right=True)
    most = len(experts) // tokens + min(len(experts), num_experts)
    tiles = torch.empty(most, 3, dtype=torch.int32, device=experts.device)
    expert_kernels.tiles_kernel[(triton.cdiv(most, BLOCK_TILES),)](
        ends, tiles, most, num_experts, BLOCK_TOKENS=tokens, BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_TILES=BLOCK_TILES,
    )  # fmt: skip
    return order, tiles


def gate_up_rows(
    x: Tensor,
    order: Tensor,
    tiles: Tensor,
    table: ExpertTable,
    biases: Tensor | None,
    gate: GatedActivation,
    in_halves: bool,
    launch: ExpertLaunch,
) -> Tensor:
    """gate(gate and up) of the rows of x, [R, W] sorted by expert. in_halves: even columns before odd ones."""
    both, columns = shape_of(table.units)
    assert x.shape[1] == columns and x.is_contiguous(), (x.shape, columns)
    inner = x.new_empty(len(order), both // 2)
    programs = len(tiles) * triton.cdiv(both // 2, launch.rows // 2)
    expert_kernels.gate_up_kernel[(programs,)](
        halves(x) if is_even(table.units) else x, inner, table.addresses, biases, order, tiles, len(tiles),
        table.num_experts, both // 2, columns, gate.gain, gate.limit, REPEATED=len(order) // len(x),
        ACTIVATION="clamped" if gate.limit else gate.activation, HALVES=in_halves, **_options(table, biases, launch),
    )  # fmt: skip
    return inner


def down_rows(
    inner: Tensor, order: Tensor, tiles: Tensor, table: ExpertTable, biases: Tensor | None, launch: ExpertLaunch
) -> Tensor:
    """Rows of ``inner``, sorted by expert, times the matrices of their experts: [R, H] in the order from before."""
    size, columns = shape_of(table.units)
    out = inner.new_empty(len(order), size)
    programs = len(tiles) * triton.cdiv(size, launch.rows)
    expert_kernels.down_kernel[(programs,)](
        inner, out, table.addresses, biases, order, tiles, len(tiles), table.num_experts, size, columns,
        **_options(table, biases, launch),
    )  # fmt: skip
    return out


def _options(table: ExpertTable, biases: Tensor | None, launch: ExpertLaunch) -> dict[str, object]:
    """What both kernels are compiled for. Weights are expanded as everywhere, without fused additions."""
    form, columns = form_of(table.units), shape_of(table.units)[1]
    group = launch.step // 2 if form.bits == 16 else form.group
    groups = 1 if form.bits == 16 else max(1, launch.step * 8 // form.bits // group)
    return {
        "BITS": form.bits, "FLOATS": form.floats, "GROUP": group, "GROUPS": groups,
        "WHOLE": columns % (group * groups) == 0, "BIASED": biases is not None, "BLOCK_ROWS": launch.rows,
        "BLOCK_TOKENS": launch.tokens, "TOGETHER": TOGETHER, "num_warps": launch.warps, "num_stages": launch.stages,
        "enable_fp_fusion": False,
    }  # fmt: skip
