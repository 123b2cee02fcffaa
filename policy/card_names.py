"""The machines that are shipped, and what their cards are called elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

SHIPPED = Path(__file__).parent / "profiles"
NOT_TOLD_APART = "nvidia|geforce|tesla|gpu"
"""Words that stand in a card's name and say nothing about which it is."""
OTHER_NAMES = {
    "3090": "rtx-3090",
    "4090": "rtx-4090",
    "5090": "rtx-5090",
    **dict.fromkeys(("a100-80gb", "a100-sxm", "a100-sxm4", "a100-sxm4-80gb", "a100-sxm-80gb"), "a100"),
    **dict.fromkeys(("a100-sxm4-40gb", "a100-sxm-40gb"), "a100-40gb"),
    **dict.fromkeys(
        ("h100-80gb", "h100-sxm", "h100-sxm5", "h100-80gb-hbm3", "h100-sxm-80gb", "h100-sxm5-80gb"), "h100"
    ),
    **dict.fromkeys(("h200-141gb", "h200-sxm", "h200-sxm5"), "h200"),
    **dict.fromkeys(("t4-16gb",), "t4"),
    **dict.fromkeys(("l4-24gb",), "l4"),
}
"""What a shipped machine's card is called elsewhere. An RTX 4090 Laptop or H100 PCIe has other rates: none of these."""


def shipped_names() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def shipped_name(name: str) -> str | None:
    """The shipped machine that "RTX 4090", "NVIDIA GeForce RTX 4090" or "rtx4090" stands for; None for others."""

    def letters(text: str) -> str:
        return re.sub(rf"{NOT_TOLD_APART}|[^a-z0-9]", "", text.lower())

    known = {letters(shipped): shipped for shipped in shipped_names()}
    known |= {letters(other): shipped for other, shipped in OTHER_NAMES.items()}
    return None if "/" in name else known.get(letters(name))
