"""What does not fit, in one layout wherever it is found out: a table of what needs how much, and the remedies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flexbatch.policy.units import BINARY, fitting_unit, size_text

LABEL_COLUMNS, SIZE_COLUMNS = 28, 12
FLAGS = {"gpu": "--gpu-memory", "cpu": "--cpu-memory"}


def shortage_text(
    title: str,
    needs: Mapping[str, Mapping[str, float]],
    budgets: Mapping[str, float],
    *,
    percent: bool = True,
    smaller_block: bool = True,
    fewer_bits: bool = True,
) -> str:
    """A title, the table, and what can be done. ``needs``: bytes by tier of everything that is needed, by its name.

    ``percent``: placements are given by the user, or may be; ``smaller_block``: there are smaller blocks;
    ``fewer_bits``: weights have bits to give.
    """
    totals = {tier: sum(sizes.get(tier, 0.0) for sizes in needs.values()) for tier in budgets}
    missing = {tier: max(0, math.ceil(totals[tier] - budgets[tier])) for tier in budgets}
    unit, size = fitting_unit(max(totals.values()), BINARY)
    lines = [title, f"  {unit:{LABEL_COLUMNS}}" + "".join(f"{tier:>{SIZE_COLUMNS}}" for tier in budgets)]
    for name, sizes in {**needs, "needed": totals, "budget": budgets, "missing": missing}.items():
        if any(sizes.values()) or name == "budget":
            cells = (_cell(sizes.get(tier, 0.0) / size) for tier in budgets)
            lines.append(f"  {name:{LABEL_COLUMNS}}" + "".join(f"{cell:>{SIZE_COLUMNS}}" for cell in cells))
    free = budgets.get("disk", math.inf) - totals.get("disk", 0.0)
    found = remedies(missing, free, percent=percent, smaller_block=smaller_block, fewer_bits=fewer_bits)
    return "\n".join([*lines, "remedies:", *(f"  - {remedy}" for remedy in found)])


def _cell(value: float) -> str:
    return "-" if not value else f"{value:,.3f}" if value >= 0.0005 else "<0.001"


def remedies(
    missing: Mapping[str, int], free_on_disk: float, *, percent: bool, smaller_block: bool, fewer_bits: bool
) -> Sequence[str]:
    """What the user can change, most direct first."""
    found = [
        f"raise {FLAGS[tier]} by {size_text(size)}"
        if tier in FLAGS
        else f"free {size_text(size)} on the disk of --offload-dir, or name a folder with more space there"
        for tier, size in missing.items()
        if size > 0
    ]
    if not found:
        return ["give any tier one layer's weights more: rounding to whole tensors exceeds a budget by a little"]
    elsewhere = sum(size for tier, size in missing.items() if tier != "disk")
    if percent and missing.get("disk"):
        found.append("move less to the disk with --percent, or leave it out, so that a placement is chosen")
    elif percent:
        free = f" ({size_text(free_on_disk)} are free in --offload-dir)" if free_on_disk < math.inf else ""
        found.append(f"move more to the disk with --percent{free}, or leave it out, so that a placement is chosen")
    if not missing.get("disk") and elsewhere > free_on_disk:
        found.append("use a disk with more space: name a folder on one in --offload-dir")
    if smaller_block:
        found.append("run a smaller block: lower --gpu-batch-size, --num-gpu-batches or --prefill-chunk")
    if fewer_bits:
        found.append("use fewer bits: --weight-bits 4, --cache-bits 4")
    return found
