"""From a model to what one of several ranks has of it: its architecture, and its part of every tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from flexbatch.models.arch import Arch
from flexbatch.models.quantized.scheme import Form, QuantizedPiece
from flexbatch.models.shard import Range, RankShard, columns, heads, width
from flexbatch.models.specs import Piece, WeightSpec, weight_specs
from flexbatch.policy.limits import weight_group
from flexbatch.validation.errors import ConfigurationError

AnyPiece = Piece | QuantizedPiece
CODES_OF_A_BYTE = 2


def shards(arch: Arch, ranks: int, groups: Mapping[str, int]) -> list[RankShard]:
    """The part of every rank. groups: as `scale_groups` has them. Raises ConfigurationError."""
    if arch.latent is not None:
        raise ConfigurationError(
            f"tensor_parallel_size={ranks}: every head of latent attention reads the same row of the cache, so each "
            "GPU would hold all of it; run one job on each GPU instead"
        )
    experts, dense = arch.experts, arch.experts is None or bool(arch.sparse_layers)
    widths = {
        "inner": (arch.intermediate_size if dense else 0, "the MLP"),
        "experts": (experts.width if experts else 0, "an expert"),
        "shared": (experts.shared_width if experts else 0, "the shared MLP"),
        "vocabulary": (arch.vocab_size, "the vocabulary"),
    }
    sizes = [columns(size, ranks, groups.get(unit, 1), what) for unit, (size, what) in widths.items()]
    attention = heads(arch.num_heads, arch.num_kv_heads, arch.head_dim, ranks, groups.get("heads", 1))
    return [
        RankShard(
            *(rank, ranks, arch.num_heads, arch.num_kv_heads, arch.head_dim),
            *attention[rank],
            *(parts[rank] for parts in sizes),
        )
        for rank in range(ranks)
    ]


def scale_groups(arch: Arch, bits: Iterable[int], stored: Mapping[str, Form]) -> dict[str, int]:
    """Columns that have to stay together, by the units that share them out: those with one scale, with weights of any
    of these bits. A row that has one scale as a whole may be cut anywhere, but for codes that share a byte. stored: by
    role, of a checkpoint that is quantized already."""
    groups: dict[str, set[int]] = {}
    quantizes = min(bits) < 16
    for spec in weight_specs(arch):
        for unit in spec.split_columns:
            found = groups.setdefault(unit, set())
            if spec.role in stored:
                group = stored[spec.role].group
                found.add(group if group < spec.shape[1] else CODES_OF_A_BYTE)
            if quantizes:
                found.add(weight_group(arch.hidden_size))
    return {unit: math.lcm(*found) for unit, found in groups.items()}


def shard_of(arch: Arch, shard: RankShard) -> Arch:
    """The architecture of what one rank has: fewer heads, narrower MLPs, the same layers."""
    experts = arch.experts
    if experts is not None:
        experts = replace(experts, width=width(shard.experts), shared_width=width(shard.shared))
    return replace(
        arch,
        num_heads=width(shard.heads),
        num_kv_heads=width(shard.kv_heads),
        intermediate_size=width(shard.inner) or arch.intermediate_size,
        experts=experts,
        shard=shard,
    )


def sharded(pieces: Iterable[AnyPiece], arch: Arch, shard: RankShard) -> Iterator[AnyPiece]:
    """What one rank has of the pieces of the whole model, ``arch``. Of a file that is mapped nothing else is read."""
    specs = {(spec.layer, spec.role): spec for spec in weight_specs(arch)}
    for piece in pieces:
        yield from _part(piece, specs[piece.layer, piece.role], shard)


def _part(piece: AnyPiece, spec: WeightSpec, shard: RankShard) -> Iterator[AnyPiece]:
    if spec.split_columns:
        yield _columns(piece, spec, shard)
    elif spec.added_once and shard.rank:
        assert isinstance(piece, Piece)
        yield replace(piece, tensor=torch.zeros_like(piece.tensor))
    elif spec.split_rows:
        yield from _rows(piece, spec, shard)
    else:
        yield piece


def _columns(piece: AnyPiece, spec: WeightSpec, shard: RankShard) -> AnyPiece:
    ranges = [shard.rows_of(unit) for unit in spec.split_columns]
    (first, end), size = ranges[0], spec.shape[1] // len(ranges)
    if isinstance(piece, Piece):
        parts = [piece.tensor[:, i * size + start : i * size + stop] for i, (start, stop) in enumerate(ranges)]
        return replace(piece, tensor=parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    a_byte, last = 8 // piece.bits, min(end, piece.columns)
    codes = piece.codes[:, first // a_byte : -(-last // a_byte)]
    return replace(piece, codes=codes, parameters=piece.parameters[:, first // piece.group : -(-last // piece.group)])


def _rows(piece: AnyPiece, spec: WeightSpec, shard: RankShard) -> Iterator[AnyPiece]:
    here = piece.rows or slice(0, spec.shape[0])
    target = 0
    for first, end in kept_rows(spec, shard):
        start, stop = max(first, here.start), min(end, here.stop)
        if start < stop:
            rows = slice(target + start - first, target + stop - first)
            part = slice(start - here.start, stop - here.start)
            if isinstance(piece, Piece):
                yield replace(piece, rows=rows, tensor=piece.tensor[part])
            else:
                yield replace(piece, rows=rows, codes=piece.codes[part], parameters=piece.parameters[part])
        target += end - first


def kept_rows(spec: WeightSpec, shard: RankShard) -> Iterator[Range]:
    """The rows of the whole tensor that a rank has, section by section."""
    offset = 0
    for unit, size in zip(spec.split_rows, spec.sections or spec.shape[:1], strict=True):
        first, end = shard.rows_of(unit)
        yield offset + first, offset + end
        offset += size
