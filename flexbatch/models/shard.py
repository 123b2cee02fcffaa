"""What one of several tensor-parallel ranks has of a model: ranges of heads, of MLP columns and of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from flexbatch.validation.errors import ConfigurationError

Range = tuple[int, int]
"""First and end."""
WIDEST_STEP = 64
"""Columns that are shared out together where the sizes allow it: what GEMMs on GPUs like."""


@dataclass(frozen=True)
class RankShard:
    """The part of one rank. Sizes that do not divide are shared out unevenly, and the first rank has the most: what
    holds it holds every other.

    kv_heads: fewer than ranks are held by several ranks, each with some of their queries; ``kv_owner`` is one of them.
    """

    rank: int
    ranks: int
    all_heads: int
    all_kv_heads: int
    head_dim: int
    heads: Range
    kv_heads: Range
    kv_owner: bool
    inner: Range
    experts: Range
    """Of the inner columns of every expert."""
    shared: Range
    """Of those of the shared MLP."""
    vocabulary: Range

    def rows_of(self, unit: str) -> Range:
        """Elements that this rank has of what `WeightSpec.split_rows` and ``split_columns`` call a unit."""
        if unit == "each_head":
            return self.heads
        first, end = getattr(self, unit)
        return (first * self.head_dim, end * self.head_dim) if unit in ("heads", "kv_heads") else (first, end)


def width(part: Range) -> int:
    return part[1] - part[0]


def shared_out(count: int, ranks: int) -> list[Range]:
    """``count`` things in a row for so many ranks, the first of which get one more where they do not divide."""
    each, more = divmod(count, ranks)
    ends = [each * (rank + 1) + min(rank + 1, more) for rank in range(ranks)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def in_steps(size: int, step: int, ranks: int) -> list[Range]:
    """``size`` columns, cut at multiples of ``step`` alone."""
    return [(first * step, min(size, end * step)) for first, end in shared_out(-(-size // step), ranks)]


def columns(size: int, ranks: int, group: int, what: str) -> list[Range]:
    """Columns of a matrix for every rank, as even as can be. group: columns that share a scale, which stay together; 1:
    none do. Raises ConfigurationError."""
    if not size:
        return [(0, 0)] * ranks
    steps = [step for step in (group << shift for shift in range(WIDEST_STEP)) if step <= max(group, WIDEST_STEP)][::-1]
    enough = [step for step in steps if -(-size // step) >= ranks]
    if not enough:
        raise ConfigurationError(
            f"tensor_parallel_size={ranks}: the {size} columns of {what} are {-(-size // group)} groups of {group} "
            f"that share a scale, which are not cut; give at most {-(-size // group)}"
        )
    even = [step for step in enough if size % (step * ranks) == 0]
    return in_steps(size, (even or enough)[0], ranks)


def heads(num_heads: int, num_kv_heads: int, head_dim: int, ranks: int, group: int) -> list[tuple[Range, Range, bool]]:
    """Heads of queries, heads of keys and values, and whether it is these heads' one owner, of every rank. group: as in
    `columns`, of the output projection. Raises ConfigurationError."""
    per_kv = num_heads // num_kv_heads
    whole = next(count for count in range(1, group + 1) if count * per_kv * head_dim % group == 0)
    most = -(-num_kv_heads // whole)
    if ranks <= most:
        parts = in_steps(num_kv_heads, whole, ranks)
        return [((first * per_kv, end * per_kv), (first, end), True) for first, end in parts]
    step = next(count for count in range(1, group + 1) if count * head_dim % group == 0)
    if whole == 1 or num_kv_heads == 1:
        # Several ranks may have the same keys and values, and each some of their queries.
        most = -(-per_kv // step) * num_kv_heads
    if not num_kv_heads <= ranks <= most:
        together = f", cut where no {group} weights with one scale are" * (group > 1)
        raise ConfigurationError(
            f"tensor_parallel_size={ranks}: this model has {num_heads} heads of queries and {num_kv_heads} of keys and "
            f"values to share out{together}; give at most {most}"
        )
    found: list[tuple[Range, Range, bool]] = []
    # The head that the fewest ranks share comes first: its ranks have the most queries.
    for head, (first, end) in enumerate(reversed(shared_out(ranks, num_kv_heads))):
        for index, (start, stop) in enumerate(in_steps(per_kv, step, end - first)):
            found.append(((head * per_kv + start, head * per_kv + stop), (head, head + 1), index == 0))
    return found
