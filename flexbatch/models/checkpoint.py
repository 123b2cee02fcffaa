"""Model folders -> pieces of canonical tensors, streamed; completeness is asserted before the first byte of a weight is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexbatch.models.arch import Arch
from flexbatch.models.dummy import dummy
from flexbatch.models.errors import CheckpointError
from flexbatch.models.families import BUFFERS, FAMILIES, Row, source_names
from flexbatch.models.resolve import fingerprint, load_tokenizer, resolve
from flexbatch.models.source import StoredTensor, list_tensors, read_json, read_tensors, sample_rows
from flexbatch.models.specs import Piece, WeightSpec, weight_specs

__all__ = ["CheckpointError", "Piece", "dummy", "fingerprint", "load", "load_tokenizer", "read_config", "resolve", "stream"]


@dataclass(frozen=True)
class _Assignment:
    """Which stored tensor fills which canonical one."""

    stored: StoredTensor
    spec: WeightSpec
    row: Row


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json, with the special tokens of generation_config.json where there is one: `generate` of transformers stops at those."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder} does not exist")
    config = read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        names = ("eos_token_id", "bos_token_id", "pad_token_id")
        config = {**config, **{name: generation[name] for name in names if generation.get(name) is not None}}
    return config


def stream(folder: Path | str, arch: Arch, skip: Collection[tuple[int, str]] = ()) -> Iterator[Piece]:
    """Every tensor of the model once, as pieces, in the order of the files; those of the (layer, role) pairs in ``skip`` are not read.

    Memory: at most 256 MiB of mapped file beside the stored tensor at hand and, where queries, keys and values are interleaved, a copy of one of the
    three. Other tensors are views of the file: copy or drop each before the next.
    Raises CheckpointError, on the call and not at the first piece, for missing, extra and mis-shaped tensors and damaged files.
    """
    assignments = _assign(list_tensors(Path(folder)), arch, Path(folder))
    return _pieces([a for a in assignments if (a.spec.layer, a.spec.role) not in skip], arch)


def _pieces(assignments: list[_Assignment], arch: Arch) -> Iterator[Piece]:
    for assignment, (_, tensor) in zip(assignments, read_tensors(a.stored for a in assignments), strict=True):
        spec, part = assignment.spec, assignment.row.part
        if part in ("grouped", "codegen"):
            yield from (Piece(spec.layer, spec.role, rows, block.reshape(-1, *tensor.shape[1:])) for rows, block in _separated(tensor, part, arch))
        else:
            yield Piece(spec.layer, spec.role, _section(spec, part), tensor)


def _section(spec: WeightSpec, part: str) -> slice | None:
    """Destination rows of a part."""
    if not part:
        return None
    index = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}[part]
    start = sum(spec.sections[:index])
    return slice(start, start + spec.sections[index])


def _separated(tensor: Tensor, layout: str, arch: Arch) -> Iterator[tuple[slice, Tensor]]:
    """Views of the queries, keys and values of an interleaved projection, with their destination rows."""
    starts = [0, arch.qkv_sections[0], arch.qkv_sections[0] + arch.qkv_sections[1], sum(arch.qkv_sections)]
    if layout == "grouped":
        group = arch.num_heads // arch.num_kv_heads
        heads = tensor.unflatten(0, (arch.num_kv_heads, group + 2, arch.head_dim))
        blocks = [heads[:, :group], heads[:, group], heads[:, group + 1]]
    else:
        # Four quarters of the heads, from four TPU cores, each with queries, values and keys in this order.
        quarters = tensor.unflatten(0, (4, 3, arch.num_heads // 4 * arch.head_dim))
        blocks = [quarters[:, 0], quarters[:, 2], quarters[:, 1]]
    return ((slice(start, end), block) for (start, end), block in zip(pairwise(starts), blocks, strict=True))


def _local_name(name: str, prefixes: tuple[str, ...], names: dict[str, Any]) -> str | None:
    """Name without the prefix that it came with, if the model knows it."""
    return next((name[len(prefix) :] for prefix in prefixes if name.startswith(prefix) and name[len(prefix) :] in names), None)


def _assign(stored: Iterable[StoredTensor], arch: Arch, folder: Path) -> list[_Assignment]:
    family, names = FAMILIES[arch.family], source_names(arch)
    specs = {(spec.layer, spec.role): spec for spec in weight_specs(arch)}
    assignments: list[_Assignment] = []
    filled: dict[str, StoredTensor] = {}
    for tensor in stored:
        local = _local_name(tensor.name, (*family.prefixes, ""), names)
        if local is None:
            if BUFFERS.search(tensor.name) or (family.skip and family.skip.search(tensor.name)):
                continue
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} {list(tensor.shape)} is not part of a {arch.family} model with {arch.num_layers} layers"
            )
        layer, row, suffix = names[local]
        if arch.tie_word_embeddings and row.role == "head" and suffix == ".weight":
            layer, row = -1, Row(row.module, "embed")
        spec = specs.get((layer, row.role + suffix))
        if spec is None:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} {list(tensor.shape)} is not expected: by config.json this model has no {row.role}{suffix}"
            )
        key = f"{layer} {spec.role} {row.part}"
        if key in filled:
            if spec.role == "embed.weight":
                _check_tied(filled[key], tensor, folder)
                continue
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} stands for the same weights as {filled[key].name} in {filled[key].file}")
        filled[key] = tensor
        _check_shape(tensor, spec, row)
        assignments.append(_Assignment(tensor, spec, row))
    _check_complete(assignments, specs, names, folder)
    return assignments


def _check_tied(first: StoredTensor, second: StoredTensor, folder: Path) -> None:
    """A tied matrix may be stored twice; 64 rows tell whether it was in truth untied, as fine-tuning sometimes does without a word in the config."""
    if first.shape != second.shape or not torch.equal(sample_rows(first), sample_rows(second)):
        raise CheckpointError(
            f"{folder / 'config.json'} says tie_word_embeddings, but {first.name} {list(first.shape)} and {second.name} {list(second.shape)} differ; "
            'write "tie_word_embeddings": false there to use both'
        )


def _check_shape(tensor: StoredTensor, spec: WeightSpec, row: Row) -> None:
    wanted = _source_shape(spec, row)
    if tensor.shape != wanted:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, wanted {list(wanted)}")


def _check_complete(assignments: list[_Assignment], specs: dict[tuple[int, str], WeightSpec], names: dict[str, tuple[int, Row, str]], folder: Path) -> None:
    found: dict[tuple[int, str], set[str]] = {}
    for a in assignments:
        found.setdefault((a.spec.layer, a.spec.role), set()).add(a.row.part)
    candidates: dict[tuple[int, str], list[tuple[str, Row]]] = {}
    for name, (layer, row, suffix) in names.items():
        candidates.setdefault((layer, row.role + suffix), []).append((name, row))
    missing = []
    for key, spec in specs.items():
        wanted, parts = {row.part for _, row in candidates[key]}, found.get(key, set())
        if parts != wanted:
            missing += [f"{name} {list(_source_shape(spec, row))}" for name, row in candidates[key] if row.part not in parts]
    if missing:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"{folder}: the weight files lack {', '.join(missing[:5])}{rest}")


def _source_shape(spec: WeightSpec, row: Row) -> tuple[int, ...]:
    rows = _section(spec, row.part if row.part not in ("grouped", "codegen") else "")
    return spec.shape if rows is None else (rows.stop - rows.start, *spec.shape[1:])


def load(folder: Path | str, arch: Arch, dtype: torch.dtype) -> dict[int, dict[str, Tensor]]:
    """The whole model in memory, stage -> role -> tensor: for small models (drafts) that live on one device."""
    stages: dict[int, dict[str, Tensor]] = {}
    for spec in weight_specs(arch):
        stages.setdefault(spec.layer, {})[spec.role] = torch.empty(spec.shape, dtype=dtype)
    for piece in stream(folder, arch):
        target = stages[piece.layer][piece.role]
        (target if piece.rows is None else target[piece.rows]).copy_(piece.tensor)
    return stages
