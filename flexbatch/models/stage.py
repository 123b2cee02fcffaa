"""What one stage of a pipeline has of a model: consecutive layers; the first stage the embedding and the head, too.

Hidden states come back from the last stage to the first: the rows that the head reads are a few per sequence, where
logits would be a vocabulary for each; a table that is both embedding and head is held once; and logits are made where
tokens are sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flexbatch.validation.errors import ConfigurationError

if TYPE_CHECKING:
    from flexbatch.models.arch import Arch
    from flexbatch.models.quantized.scheme import QuantizedPiece
    from flexbatch.models.specs import Piece

SINKS = "sinks."
"""Of the embedding stage by their names, and read in their layers (`specs.sink_role`)."""


@dataclass(frozen=True)
class RankStage:
    """first, end: of the model's layers, which count from 0 here."""

    index: int
    stages: int
    first: int
    end: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.stages - 1

    def here(self, layer: int, role: str, num_layers: int) -> tuple[int, str] | None:
        """Layer and role here of a tensor of the whole model; None where another stage has it."""
        if layer == -1 and role.startswith(SINKS):
            layer = int(role.removeprefix(SINKS))
            return (-1, f"{SINKS}{layer - self.first}") if self.first <= layer < self.end else None
        if layer == -1:
            return (layer, role) if self.is_first else None
        if layer == num_layers:
            return (self.end - self.first, role) if self.is_first else None
        return (layer - self.first, role) if self.first <= layer < self.end else None


def shared_out_by_cost(outside: float, layers: Sequence[float], stages: int) -> list[RankStage]:
    """Consecutive layers for every stage, so that the dearest stage is as cheap as can be. outside: the cost of
    embedding and head, which the first stage has. Raises ConfigurationError."""
    count = len(layers)
    if count < stages:
        raise ConfigurationError(
            f"pipeline_parallel_size={stages}: this model has {count} layers, and every stage needs one at least; give "
            f"at most {count}"
        )
    before = [0.0]
    for cost in layers:
        before.append(before[-1] + cost)
    # By the number of layers so far: cost of the dearest stage, sum of squares, and where the latest one begins.
    best = [(outside + before[end], (outside + before[end]) ** 2, 0) for end in range(count + 1)]
    starts: list[list[int]] = []
    for stage in range(1, stages):
        found = [(float("inf"), 0.0, 0)] * (count + 1)
        for end in range(stage + 1, count + 1):
            options = ((first, before[end] - before[first]) for first in range(stage, end))
            found[end] = min((max(best[first][0], cost), best[first][1] + cost**2, first) for first, cost in options)
        starts.append([each[2] for each in found])
        best = found
    ends = [count]
    for each in reversed(starts):
        ends.insert(0, each[ends[0]])
    return [
        RankStage(index, stages, first, end) for index, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]


def stage_of(arch: Arch, stage: RankStage) -> Arch:
    """The architecture of what one stage has: its layers."""
    layers = slice(stage.first, stage.end)
    sparse, experts = arch.sparse_layers[layers], arch.experts
    if sparse and not any(sparse):
        sparse, experts = (), None
    return replace(
        arch,
        num_layers=stage.end - stage.first,
        sliding_layers=arch.sliding_layers[layers],
        rope_layers=arch.rope_layers[layers],
        sparse_layers=sparse,
        experts=experts,
        stage=stage,
    )


def staged(
    pieces: Iterable[Piece | QuantizedPiece], stage: RankStage, num_layers: int
) -> Iterator[Piece | QuantizedPiece]:
    """Of the pieces of the whole model those of one stage, as it counts layers."""
    for piece in pieces:
        if (here := stage.here(piece.layer, piece.role, num_layers)) is not None:
            yield replace(piece, layer=here[0], role=here[1])
