"""Numbers with units: for a reader, the unit in which they are not all zeros; and sizes as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

MIB, GIB = 2**20, 2**30
BINARY = {"GiB": GIB, "MiB": MIB, "KiB": 2**10}
DECIMAL = {"GB": 10**9, "MB": 10**6, "kB": 10**3}
SIZES = {"": 1, "b": 1, "tb": 10**12, "tib": 2**40} | {name.lower(): size for name, size in (BINARY | DECIMAL).items()}
LEAST_BARE = 2**20
"""Bytes that a number without unit means, at least, unless it is 0: nobody has a budget of less than 1 MiB."""
LARGEST_BARE_GIB = 2048
"""Above this, who forgets the unit means MiB."""
FLOPS = {"TFLOP": 10**12, "GFLOP": 10**9, "MFLOP": 10**6}


def fitting_unit(largest: float, units: Mapping[str, int]) -> tuple[str, int]:
    """The largest unit in which the largest value is at least 1, else the smallest; and what it counts."""
    return next(((name, size) for name, size in units.items() if largest >= size), list(units.items())[-1])


def size_text(num_bytes: float) -> str:
    """ "1.500 GiB", "12.000 MiB": bytes with three decimals; "12 bytes" where they would all be zeros or wrong."""
    if num_bytes < BINARY["KiB"]:
        return f"{math.ceil(num_bytes)} bytes"
    unit, size = fitting_unit(num_bytes, BINARY)
    return f"{num_bytes / size:.3f} {unit}"


def duration_text(seconds: float) -> str:
    """ "0.25 ms", "3.4 s", "4 min 10 s", "5 h 54 min", "6.6 days": with two or three digits that count."""
    if seconds < 59.95:
        value, unit = (seconds * 1e3, "ms") if seconds < 1 else (seconds, "s")
        return f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    return f"{minutes / (24 * 60):,.1f} days"


def number_text(value: float) -> str:
    """ "0.0043", "1.02", "18.2", "12,345": three digits that count, and no powers of ten."""
    if value >= 0.995:
        return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    return f"{float(f'{value:.2g}'):f}".rstrip("0").rstrip(".")


def parse_size(text: str) -> int:
    """Bytes of ``"16GiB"``, ``"500MB"``, ``"1.5 GiB"`` or ``"1073741824"``. Raises ValueError; for a bare number that
    is too small to be one of bytes it asks for the unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is not None and unit in ("k", "m", "g", "t"):
        raise ValueError(f"not a size in bytes: {text!r}; did you mean {match[1]}{unit.upper()}iB?")
    if match is None or unit not in SIZES:
        raise ValueError(f"not a size in bytes: {text!r}; write e.g. 16GiB, 500MB or 1073741824")
    size = int(float(match[1]) * SIZES[unit])
    if not unit and float(match[1]) and size < LEAST_BARE:
        meant = "GiB" if float(match[1]) <= LARGEST_BARE_GIB else "MiB"
        raise ValueError(f"{text.strip()} would be bytes, as it has no unit; did you mean {match[1]}{meant}?")
    return size
