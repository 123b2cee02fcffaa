"""Model folders and GGUF files -> pieces of canonical tensors, streamed; completeness is asserted before the first byte
of a weight is read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flexbatch.models import families
from flexbatch.models.arch import Arch
from flexbatch.models.assignment import Assignment, assign, untied
from flexbatch.models.config_types import KEYS, check_keys
from flexbatch.models.gguf import files as gguf_files
from flexbatch.models.gguf.parts import is_gguf
from flexbatch.models.packed import BITS, Packing, QuantizedPiece, read_packing, unpack
from flexbatch.models.source import list_tensors, read_json, read_tensors
from flexbatch.models.specs import Piece, weight_specs
from flexbatch.validation.errors import CheckpointError

logger = logging.getLogger("flexbatch")

__all__ = ["CheckpointError", "Piece", "QuantizedPiece", "load", "prequantized", "read_arch", "read_config", "stream"]


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json, with the special tokens of generation_config.json where there is one: `generate` of transformers
    stops at those."""
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


def _packing(folder: Path) -> Packing | None:
    config = read_config(folder)
    with _saying(folder):
        return read_packing(config)


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

    The matrices of an AWQ or GPTQ checkpoint, and those of a GGUF file that a store holds exactly, come as
    QuantizedPiece with ``packed``, else expanded, one at a time. Memory: at most 256 MiB of mapped file beside the
    stored tensor at hand and, where queries, keys and values are interleaved, a copy of one of the three. Other tensors
    are views of the file: copy or drop each before the next. Raises CheckpointError, on the call and not at the first
    piece, for missing and mis-shaped tensors and damaged files; what the files hold beside the model is left alone, and
    said.
    """
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_files.stream(folder, arch, skip, packed)
    packing = _packing(folder)
    assignments = assign(list_tensors(folder), arch, folder, packing, noting=True)
    return _pieces([a for a in assignments if (a.spec.layer, a.spec.role) not in skip], arch, packing, packed)


def check(folder: Path | str, arch: Arch) -> None:
    """Raises CheckpointError for missing and mis-shaped tensors and files whose headers are damaged; no tensor is
    read."""
    folder = Path(folder)
    if is_gguf(folder):
        gguf_files.check(folder, arch)
    else:
        assign(list_tensors(folder), arch, folder, _packing(folder))


def prequantized(folder: Path | str, arch: Arch) -> dict[str, tuple[int, int]]:
    """(bits, group) of the roles that `stream` with ``packed`` delivers in codes in every layer; empty for an
    ordinary checkpoint. Reads headers only."""
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_files.prequantized(folder, arch)
    packing = _packing(folder)
    if packing is None:
        return {}
    formats: dict[str, set[tuple[int, int]]] = {}
    for a in assign(list_tensors(folder), arch, folder, packing):
        # 16 stands for a matrix that the quantizer left alone; a role with both comes expanded or is quantized by the
        # store.
        formats.setdefault(a.spec.role, set()).add(
            (16, 0) if "" in a.stored else (BITS, packing.group_of(a.spec.shape[1]))
        )
    return {role: next(iter(found)) for role, found in formats.items() if len(found) == 1 and (16, 0) not in found}


def _pieces(
    assignments: list[Assignment], arch: Arch, packing: Packing | None, packed: bool
) -> Iterator[Piece | QuantizedPiece]:
    tensors = read_tensors(stored for a in assignments for stored in a.stored.values())
    for a in assignments:
        parts = {suffix: next(tensors)[1] for suffix in a.stored}
        if "" in parts:
            dense = parts.pop("").t() if a.row.part == "transposed" else parts.pop("")
            yield from (Piece(a.spec.layer, a.spec.role, rows, block) for rows, (block,) in _blocks(a, arch, dense))
            del dense
            continue
        assert packing is not None
        codes, parameters = unpack(
            packing, parts, f"{a.stored['qweight'].file}: {a.stored['qweight'].name.rpartition('.')[0]}"
        )
        dtype = parts["scales"].dtype
        parts.clear()
        for rows, (block, block_parameters) in _blocks(a, arch, codes, parameters):
            piece = QuantizedPiece(
                a.spec.layer, a.spec.role, rows, block, block_parameters, BITS, packing.group_of(a.spec.shape[1])
            )
            yield piece if packed else piece.dense(dtype)


def _blocks(assignment: Assignment, arch: Arch, *tensors: Tensor) -> Iterator[tuple[slice | None, tuple[Tensor, ...]]]:
    """The tensors whole, or their queries, keys and values in turn where these are interleaved; with the destination
    rows."""
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
        stages.setdefault(spec.layer, {})[spec.role] = torch.empty(spec.shape, dtype=dtype)
    for piece in stream(folder, arch):
        target = stages[piece.layer][piece.role]
        (target if piece.rows is None else target[piece.rows]).copy_(piece.tensor)
    return stages
