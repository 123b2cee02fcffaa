"""FlexGen's six numbers: per cent of weights, cache and activations on GPU and on CPU; the rest lies on disk."""

from __future__ import annotations

from collections.abc import Sequence

KINDS = ("weights", "cache", "activations")
TOLERANCE = 1e-4
"""By how much two shares may pass 100 together: a millionth of them, as sums of floats and of printed digits do."""


def checked_pair(gpu: float | None, cpu: float | None, kind: str = "") -> tuple[float | None, float | None]:
    """Both shares of one kind, at least 0 and together at most 100; None where a share is left open.

    Shares that a plan has found are products of floats: 92.8945 and 7.10554 may be 100.00000000000001. What is beyond
    the bounds by no more than `TOLERANCE` is taken for the bound. Raises ValueError for anything else, NaN included.
    """
    given = [share for share in (gpu, cpu) if share is not None]
    # A comparison that does not hold refuses, not one that holds: NaN compares with nothing.
    if not (all(share >= -TOLERANCE for share in given) and sum(given) <= 100 + TOLERANCE):
        words = [("open" if share is None else f"{share:.7g}") for share in (gpu, cpu)]
        of_kind = f"{kind} on" if kind else "on"
        raise ValueError(
            f"percent: {of_kind} gpu ({words[0]}) and cpu ({words[1]}) must be >= 0 and sum to at most 100 (the rest "
            f"is on disk), not {sum(given):.7g}"
        )
    on_gpu = None if gpu is None else min(max(gpu, 0.0), 100.0)
    return on_gpu, None if cpu is None else min(max(cpu, 0.0), 100.0 - (on_gpu or 0.0))


def checked_percent(percent: Sequence[float | None]) -> tuple[float | None, ...]:
    """All six, each pair as `checked_pair` has it. Raises ValueError."""
    if len(percent) != 6:
        raise ValueError(f"percent needs six numbers (weights, cache, activations on GPU and CPU), got {len(percent)}")
    pairs = zip(KINDS, percent[0::2], percent[1::2], strict=True)
    return tuple(share for kind, gpu, cpu in pairs for share in checked_pair(gpu, cpu, kind))


def percent_text(percent: Sequence[float], digits: int = 7) -> str:
    """Six shares with so many digits, as they can be given again: rounded up, both shares of a kind could pass 100
    together (60.365 and 39.635 as 60.37 and 39.64). By default enough for the same tensors to go to the same tiers:
    with 15.68 for 15.678 one of Llama-3.1-70B's went to the GPU, which had no room for it."""
    words = []
    for gpu, cpu in zip(percent[0::2], percent[1::2], strict=True):
        on_gpu = f"{gpu:.{digits}g}"
        on_cpu = f"{cpu:.{digits}g}"
        if float(on_gpu) + float(on_cpu) > 100:
            on_cpu = f"{100 - float(on_gpu):.{digits}g}"
        words += [on_gpu, on_cpu]
    return " ".join(words)
