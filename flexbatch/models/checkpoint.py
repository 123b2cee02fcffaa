"""Model folders and GGUF files -> pieces of canonical tensors, streamed; completeness is asserted before the first byte
of a weight is read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flexbatch.models import families
from flexbatch.models.ahead import ahead
from flexbatch.models.arch import Arch
from flexbatch.models.assignment import Assignment, assign, untied
from flexbatch.models.config_types import KEYS, QUANTIZERS, check_keys
from flexbatch.models.gguf import files as gguf_files
from flexbatch.models.gguf.parts import is_gguf
from flexbatch.models.quantized import decoding
from flexbatch.models.quantized.config import Quantization, read_quantization
from flexbatch.models.quantized.scheme import Form, QuantizedPiece
from flexbatch.models.source import list_tensors, read_json, read_tensors
from flexbatch.models.source_rows import rows_of_head
from flexbatch.models.specs import Piece, weight_specs
from flexbatch.validation.errors import CheckpointError

logger = logging.getLogger("flexbatch")

DECODERS = 3
"""Matrices that are unpacked while another one is used. On an H200's machine one thread unpacked 0.5 GB/s of GPTQ."""

__all__ = ["CheckpointError", "Piece", "QuantizedPiece", "load", "prequantized", "read_arch", "read_config", "stream"]


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json, with the special tokens of generation_config.json where there is one (`generate` of transformers
    stops at those) and the quantization that one of `QUANTIZERS` tells where it does not."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder} does not exist")
    config = read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        names = ("eos_token_id", "bos_token_id")
        with _saying(folder):
            check_keys(generation, {name: KEYS[name] for name in names}, file="generation_config.json")
        config = {**config, **{name: generation[name] for name in names if generation.get(name) is not None}}
    for name, method in QUANTIZERS.items():
        if not (config.get("quantization_config") or config.get("compression_config")) and (folder / name).is_file():
            told = {key: value for key, value in read_json(folder / name).items() if value is not None}
            config = {**config, "quantization_config": {"quant_method": method, **told}}
    return config


def read_arch(folder: Path | str) -> Arch:
    """What the folder's config.json describes; an embedding and a head that it calls one and that differ in the files
    are two.

    Raises CheckpointError that names the folder and the key.
    """
    if is_gguf(Path(folder)):
        return gguf_files.read_arch(Path(folder))
    config = read_config(folder)
    with _saying(folder):
        arch = families.read_arch(config)
    if not arch.tie_word_embeddings:
        return arch
    try:
        two = untied(list_tensors(Path(folder)), arch)
    except CheckpointError:
        return arch  # whoever reads the weights will say what is wrong with them
    if two is None:
        return arch
    logger.warning(
        "%s says tie_word_embeddings, but %s and %s differ: both are used; "
        'write "tie_word_embeddings": false there to say so',
        Path(folder) / "config.json",
        *(tensor.name for tensor in two),
    )
    return dataclasses.replace(arch, tie_word_embeddings=False)


@contextmanager
def _saying(folder: Path | str) -> Iterator[None]:
    """What is wrong with a config is said with the folder that it lies in."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def quantization_of(folder: Path) -> Quantization | None:
    """How the config.json of a folder says that its matrices are stored. Raises CheckpointError."""
    config = read_config(folder)
    with _saying(folder):
        return read_quantization(config)


@overload
def stream(folder: Path | str, arch: Arch, skip: Collection[tuple[int, str]] = ()) -> Iterator[Piece]: ...


@overload
def stream(
    folder: Path | str, arch: Arch, skip: Collection[tuple[int, str]] = (), *, packed: Literal[True]
) -> Iterator[Piece | QuantizedPiece]: ...


def stream(
    folder: Path | str, arch: Arch, skip: Collection[tuple[int, str]] = (), *, packed: bool = False
) -> Iterator[Any]:
    """Every tensor of the model once, as pieces, in the order of the files; those of the (layer, role) pairs in
    ``skip`` are not read.

    The matrices of a quantized checkpoint or GGUF file that a store holds exactly come as QuantizedPiece with
    ``packed``, else expanded, one at a time. Memory: at most 256 MiB of mapped file beside the stored tensor at hand
    (where some come in codes, and the next `DECODERS`), its codes at one byte each and, where queries, keys and values
    are interleaved, a copy of one of the three. Other tensors are views of the file: copy or drop each before the next.
    Raises CheckpointError, on the call and not at the first piece, for missing and mis-shaped tensors and damaged
    files; what the files hold beside the model is left alone, and said.
    """
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_files.stream(folder, arch, skip, packed)
    quantization = quantization_of(folder)
    assignments = assign(list_tensors(folder), arch, folder, quantization, noting=True)
    kept: dict[str, Form] = {}
    if packed and quantization is not None:
        kept = decoding.note(folder, quantization, assignments, arch)
    return _pieces([a for a in assignments if (a.spec.layer, a.spec.role) not in skip], arch, kept)


def check(folder: Path | str, arch: Arch) -> None:
    """Raises CheckpointError for missing and mis-shaped tensors and files whose headers are damaged; no tensor is
    read."""
    folder = Path(folder)
    if is_gguf(folder):
        gguf_files.check(folder, arch)
    else:
        assign(list_tensors(folder), arch, folder, quantization_of(folder))


def prequantized(folder: Path | str, arch: Arch) -> dict[str, Form]:
    """The forms of the roles that `stream` with ``packed`` delivers in codes in every layer; empty for an
    ordinary checkpoint. Reads headers, and in what order the groups of GPTQ take their inputs."""
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_files.prequantized(folder, arch)
    quantization = quantization_of(folder)
    if quantization is None:
        return {}
    return decoding.formats(assign(list_tensors(folder), arch, folder, quantization), arch)


def summary(folder: Path, arch: Arch, kept: Collection[str]) -> str | None:
    """How many matrices in codes come as they are, those of the roles ``kept``, and how many are expanded; None: the
    checkpoint has none. Reads headers only."""
    if is_gguf(folder):
        return gguf_files.summary(folder, arch, kept)
    quantization = quantization_of(folder)
    if quantization is None:
        return None
    return decoding.summary(assign(list_tensors(folder), arch, folder, quantization), kept)


def _pieces(assignments: list[Assignment], arch: Arch, kept: Collection[str]) -> Iterator[Piece | QuantizedPiece]:
    """kept: the roles that come in codes."""
    tensors = read_tensors(stored for a in assignments for stored in a.stored.values())
    read = ((a, {suffix: next(tensors)[1] for suffix in a.stored}) for a in assignments)

    def decoded(each: tuple[Assignment, dict[str, Tensor]]) -> list[Piece | QuantizedPiece] | None:
        a, parts = each
        in_codes = a.scheme is not None and a.spec.role in kept and a.source_experts is None
        return list(decoding.pieces(a, parts, True, partial(_blocks, arch))) if in_codes else None

    for (a, parts), pieces in ahead(decoded, read, DECODERS if kept else 0):
        if pieces is not None:
            yield from pieces
            continue
        if a.scheme is not None:
            yield from decoding.pieces(a, parts, a.spec.role in kept, partial(_blocks, arch))
            continue
        dense = parts.pop("").t() if a.row.part == "transposed" else parts.pop("")
        if a.row.says("row"):
            dense = dense[0]
        if a.source_experts is not None:
            yield from _of_experts(a, dense if a.row.says("stacked") else dense.unflatten(0, (_count(arch), -1)))
            continue
        dense = decoding.gates_first(dense, 1) if a.row.says("pairs") else dense
        yield from (Piece(a.spec.layer, a.spec.role, rows, block) for rows, (block,) in _blocks(arch, a, dense))
        del dense


def _count(arch: Arch) -> int:
    assert arch.experts is not None
    return arch.experts.count


def _of_experts(assignment: Assignment, dense: Tensor) -> Iterator[Piece]:
    """Those experts of a stored tensor [experts, ...] that a canonical one holds, one at a time: of gates and ups by
    turns a copy is made."""
    row, spec = assignment.row, assignment.spec
    assert assignment.source_experts is not None
    for index, matrix in enumerate(dense[assignment.source_experts]):
        matrix = matrix.t() if row.says("turned") else matrix
        matrix = decoding.gates_first(matrix, 0) if row.says("pairs") else matrix
        first = 0 if assignment.rows is None else assignment.rows.start
        rows = slice(first + index * len(matrix), first + (index + 1) * len(matrix))
        yield Piece(spec.layer, spec.role, rows, matrix)


def _blocks(arch: Arch, assignment: Assignment, *tensors: Tensor) -> Iterator[tuple[slice | None, tuple[Tensor, ...]]]:
    """The tensors whole, or their queries, keys and values in turn where these are interleaved; with the destination
    rows."""
    if assignment.row.says("heads"):
        heads = (tensor.unflatten(0, (-1, sum(assignment.row.heads))) for tensor in tensors)
        yield None, tuple(each[:, rows_of_head(assignment.row)].flatten(0, 1) for each in heads)
        return
    if assignment.row.part not in ("grouped", "codegen"):
        yield assignment.rows, tensors
        return
    ends = list(accumulate(arch.qkv_sections, initial=0))
    for index, (start, end) in enumerate(pairwise(ends)):
        yield (
            slice(start, end),
            tuple(
                separated(tensor, assignment.row.part, arch)[index].reshape(-1, *tensor.shape[1:]) for tensor in tensors
            ),
        )


def separated(tensor: Tensor, layout: str, arch: Arch) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the queries, keys and values of an interleaved projection."""
    if layout == "grouped":
        group = arch.num_heads // arch.num_kv_heads
        heads = tensor.unflatten(0, (arch.num_kv_heads, group + 2, arch.head_dim))
        return heads[:, :group], heads[:, group], heads[:, group + 1]
    # Four quarters of the heads, from four TPU cores, each with queries, values and keys in this order.
    quarters = tensor.unflatten(0, (4, 3, arch.num_heads // 4 * arch.head_dim))
    return quarters[:, 0], quarters[:, 2], quarters[:, 1]


def load(folder: Path | str, arch: Arch, dtype: torch.dtype) -> dict[int, dict[str, Tensor]]:
    """The whole model in memory, stage -> role -> tensor: for small models (drafts) that live on one device."""
    stages: dict[int, dict[str, Tensor]] = {}
    for spec in weight_specs(arch):
        stages.setdefault(spec.layer, {})[spec.role] = torch.empty(
            spec.shape, dtype=torch.float32 if spec.wide else dtype
        )
    for piece in stream(folder, arch):
        target = stages[piece.layer][piece.role]
        (target if piece.rows is None else target[piece.rows]).copy_(piece.tensor)
    return stages
