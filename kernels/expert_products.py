"""The gated MLPs of a mixture of experts in Triton: as many launches for 512 experts as for one, wherever their
matrices lie and in whatever codes, and the host waits for nothing.

T: tokens, K: experts of each, R = T x K routed rows; H: hidden size, W: width of an expert, E: experts. The oracle is
`experts.by_loop`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from flexbatch.kernels import expert_kernels
from flexbatch.kernels.expert_codes import ExpertStacks, GatedActivation
from flexbatch.kernels.whole_numbers import ceil_div, next_power_of_2


@dataclass(frozen=True)
class ExpertLaunch:
    """Shape of a tile: rows of a matrix, tokens, and bytes of a matrix' row in a step; warps and stages of a
    program."""

    rows: int = 128
    tokens: int = 16
    step: int = 64
    warps: int = 4
    stages: int = 4


TOKENS = (16, 32, 64, 128)
"""Tokens of a tile: the least that the mean expert fits. Plans count them as `limits.EXPERT_TILES`."""
LEAST_STEP = 16
"""Inputs that a matrix product of a GPU takes together, at least."""
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


FLOAT32 = ExpertLaunch(64, 16, 64, 4, 2)
"""Whatever the number of tokens: without tensor cores, and exact."""


def launch_of(rows: int, num_experts: int, bits: int, x: Tensor) -> ExpertLaunch:
    """By the mean number of tokens of an expert, which the host knows, and with as many stages as the memory that a
    program may share holds."""
    if x.dtype == torch.float32:
        return FLOAT32
    mean = rows / max(1, min(rows, num_experts))
    tokens = next((size for size in TOKENS if mean <= size), TOKENS[-1])
    launch = (PLAIN if bits == 16 else CODED)[tokens]
    stages = shared_bytes(x.device) // stage_bytes(launch, bits, x.element_size())
    return replace(launch, stages=max(1, min(launch.stages, stages)))


def stage_bytes(launch: ExpertLaunch, bits: int, element_bytes: int) -> int:
    """Of a block of weights and the inputs that it is multiplied with."""
    inputs = launch.step // element_bytes if bits == 16 else launch.step * 8 // bits
    return launch.rows * launch.step + launch.tokens * inputs * element_bytes


def shared_bytes(device: torch.device) -> int:
    """Shared memory of a program, at most. Triton's interpreter knows no limit."""
    if device.type != "cuda":
        return 1 << 30
    known = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return known or triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


def halves(x: Tensor) -> Tensor:
    """[rows, size] with all even columns before all odd ones."""
    return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)


def expert_mlp(
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    gate_up: ExpertStacks,
    down: ExpertStacks,
    gate: GatedActivation,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    launch: ExpertLaunch | None = None,
) -> Tensor:
    """Sum over the experts ``chosen`` [T, K] of ``shares`` [T, K] times down(gate(gate_up)) of x [T, H]: [T, H].
    ``launch``: that of `launch_of` unless given."""
    out = torch.empty_like(x)
    if not chosen.numel():
        return out
    routed, top_k = routed_rows(x, chosen, gate_up, down, gate, biases, launch), chosen.shape[1]
    block = min(1024, next_power_of_2(x.shape[1]))
    expert_kernels.weighted_kernel[len(x), ceil_div(x.shape[1], block)](
        routed, shares.contiguous(), out, x.shape[1], CHOICES=top_k, BLOCK=block
    )
    return out


def routed_rows(
    x: Tensor,
    chosen: Tensor,
    gate_up: ExpertStacks,
    down: ExpertStacks,
    gate: GatedActivation,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    launch: ExpertLaunch | None = None,
) -> Tensor:
    """[R, H]: what every choice makes of x. Of those above the number of experts nothing is written."""
    rows = chosen.numel()
    if not rows:
        return x.new_empty(0, down.shape[0])
    launch = launch or launch_of(rows, gate_up.num_experts, gate_up.form.bits, x)
    order, tiles = tiles_of(chosen.flatten(), gate_up.num_experts, launch.tokens)
    inner = gate_up_rows(x, order, tiles, gate_up, biases[0], gate, down.in_halves, launch)
    return down_rows(inner, order, tiles, down, biases[1], launch)


def tiles_of(experts: Tensor, num_experts: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert [R], and the tiles of at most ``tokens`` of them [as many as there may be, 3]: expert or
    -1, first row, end of the expert's rows."""
    # Numbers of 16 bits are sorted in two passes of a radix sort, of 64 bits in eight.
    ordered, order = experts.to(torch.int16).sort(stable=True)
    numbers = torch.arange(num_experts, dtype=torch.int16, device=experts.device)
    ends = torch.searchsorted(ordered, numbers, right=True)
    most = len(experts) // tokens + min(len(experts), num_experts)
    tiles = torch.empty(most, 3, dtype=torch.int32, device=experts.device)
    expert_kernels.tiles_kernel[(ceil_div(most, BLOCK_TILES),)](
        ends, tiles, most, num_experts, BLOCK_TOKENS=tokens, BLOCK_EXPERTS=next_power_of_2(num_experts),
        BLOCK_TILES=BLOCK_TILES,
    )  # fmt: skip
    return order, tiles


def gate_up_rows(
    x: Tensor,
    order: Tensor,
    tiles: Tensor,
    stacks: ExpertStacks,
    biases: Tensor | None,
    gate: GatedActivation,
    in_halves: bool,
    launch: ExpertLaunch,
) -> Tensor:
    """gate(gate and up) of the rows of x, [R, W] sorted by expert. in_halves: even columns before odd ones."""
    both, columns = stacks.shape
    assert x.shape[1] == columns and x.is_contiguous(), (x.shape, columns)
    inner = x.new_empty(len(order), both // 2)
    programs = len(tiles) * ceil_div(both // 2, launch.rows // 2)
    expert_kernels.gate_up_kernel[(programs,)](
        halves(x) if stacks.in_halves else x, inner, stacks.addresses, biases, order, tiles, len(tiles),
        stacks.num_experts, both // 2, columns, gate.gain, gate.limit, REPEATED=len(order) // len(x),
        ACTIVATION="clamped" if gate.limit else gate.activation, HALVES=in_halves,
        **_options(stacks, biases, launch, x),
    )  # fmt: skip
    return inner


def down_rows(
    inner: Tensor, order: Tensor, tiles: Tensor, stacks: ExpertStacks, biases: Tensor | None, launch: ExpertLaunch
) -> Tensor:
    """Rows of ``inner``, sorted by expert, times the matrices of their experts: [R, H] in the order from before."""
    size, columns = stacks.shape
    out = inner.new_empty(len(order), size)
    programs = len(tiles) * ceil_div(size, launch.rows)
    expert_kernels.down_kernel[(programs,)](
        inner, out, stacks.addresses, biases, order, tiles, len(tiles), stacks.num_experts, size, columns,
        **_options(stacks, biases, launch, inner),
    )  # fmt: skip
    return out


def _options(stacks: ExpertStacks, biases: Tensor | None, launch: ExpertLaunch, x: Tensor) -> dict[str, object]:
    """What both kernels are compiled for. Weights are expanded as everywhere, without fused additions."""
    form, columns = stacks.form, stacks.shape[1]
    if form.bits == 16:
        group = step = launch.step // x.element_size()
        in_step = 1
    else:
        group, step = form.group, launch.step * 8 // form.bits
        in_step = min(group, step) * form.bits // 8
    together = max(1, step // group) * in_step if form.bits != 16 else step
    assert together >= LEAST_STEP, f"a step of {together} inputs, tensor cores take {LEAST_STEP} or more"
    return {
        "BITS": form.bits, "FLOATS": form.floats, "GROUP": group, "GROUPS": max(1, step // group), "BYTES": in_step,
        "WHOLE": columns % step == 0, "BIASED": biases is not None, "BLOCK_ROWS": launch.rows,
        "BLOCK_TOKENS": launch.tokens, "TOGETHER": TOGETHER, "COMPILED": x.is_cuda,
        "num_warps": launch.warps, "num_stages": launch.stages,
        "enable_fp_fusion": False,
    }  # fmt: skip
