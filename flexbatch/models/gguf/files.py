"""A GGUF file as a checkpoint: its architecture, and its tensors as pieces of canonical ones."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexbatch.models.arch import Arch
from flexbatch.models.assignment import Assignment, assign, untied
from flexbatch.models.families import FAMILIES, source_names
from flexbatch.models.gguf import config
from flexbatch.models.gguf.architectures import family_of
from flexbatch.models.gguf.blocks import (
    CODE_BITS,
    FLOAT_BLOCKS,
    FLOATS,
    GROUP,
    codes_and_parameters,
    floats_and_scales,
    numbers,
    raw_rows,
    rows_and_columns,
)
from flexbatch.models.gguf.header import Header, read_header
from flexbatch.models.module_names import ModuleMapping
from flexbatch.models.quantized.decoding import kept_and_expanded
from flexbatch.models.quantized.scheme import Form, QuantizedPiece
from flexbatch.models.source_rows import parts_of_expert
from flexbatch.models.specs import Piece, weight_specs

logger = logging.getLogger("flexbatch")

CHUNK_BYTES = 32 << 20
"""Of float32, expanded at a time; the package gguf holds them twice."""
BESIDE = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that are part of the configuration."""

CODED_ROLES = re.compile(r"(qkv|o|(shared\.|experts\.\d+\.)?(gate_up|up|down))\.weight")
"""Matrices of layers that may be stored in codes: routers and biases of experts are too small, and too sensitive."""
EXPERTS = (("gate", "gate_up", "stacked gate"), ("up", "gate_up", "stacked up"), ("down", "down", "stacked"))
BIASES = (("gate", "gate_up", "left"), ("up", "gate_up", "right"), ("down", "down", ""))
"""(name in the file, role, part) of what is there of all experts together."""

Names = dict[str, tuple[int, ModuleMapping, str]]
Formats = dict[str, Form]


def read_arch(path: Path) -> Arch:
    """Raises CheckpointError. A head that equals the embedding, as early converters wrote it, is the embedding."""
    header = read_header(path)
    arch = config.read_arch(header)
    if arch.tie_word_embeddings or not FAMILIES[arch.family].defaults.get("tie_word_embeddings"):
        return arch
    tied = replace(arch, tie_word_embeddings=True)
    return arch if untied(header.tensors.values(), tied, names_of(header, tied)) else tied


def names_of(header: Header, arch: Arch) -> Names:
    """Tensor name -> (stage, row, ``.weight`` or ``.bias``): the family's rows under the names that the package gguf
    has for them, with queries, keys and values in turn and every matrix as [outputs, inputs]."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    own = header.architecture if header.architecture in known else "llama"
    table = get_tensor_name_map(known[own], arch.num_layers)
    specs = {(spec.layer, spec.role) for spec in weight_specs(arch)}
    names: Names = {}
    unfit: Names = {}
    for source, (layer, row, suffix) in source_names(arch).items():
        if row.role.startswith("expert"):
            continue
        module = source.removesuffix(suffix)
        tries = (table.get_name(prefix + module) for prefix in FAMILIES[arch.family].prefixes)
        name = next((found for found in tries if found is not None), None)
        if name is None:
            continue
        part = row.part if row.part in ("q", "k", "v", "gate", "up") else ""
        part = "vector" if row.role == "shared_gate" else part
        own_suffix = suffix or ".weight"  # what is bare elsewhere
        # Two rows may have one name (norms of the models of a family): the one that this model has.
        target = names if (layer, row.role + suffix) in specs else unfit
        target.setdefault(name + own_suffix, (layer, ModuleMapping(row.module, row.role, part), suffix))
    return {**unfit, **names, **_names_of_experts(arch)}


def _names_of_experts(arch: Arch) -> Names:
    """Tensors [experts, outputs, inputs] and [experts, outputs]."""
    names: Names = {}
    for layer in range(arch.num_layers):
        if (experts := arch.experts_of(layer)) is None:
            continue
        for name, role, part in EXPERTS:
            module = f"blk.{layer}.ffn_{name}_exps"
            names[f"{module}.weight"] = layer, ModuleMapping(module, f"experts.{role}", part), ".weight"
        for name, role, part in BIASES if experts.bias else ():
            module = f"blk.{layer}.ffn_{name}_exps"
            names[f"{module}.bias"] = layer, ModuleMapping(module, f"expert_biases.{role}", part), ""
    return names


def assignments_of(header: Header, arch: Arch, noting: bool = False) -> list[Assignment]:
    """What fills which rows of the canonical tensors. Raises CheckpointError."""
    stored = [tensor for name, tensor in header.tensors.items() if name not in BESIDE]
    return assign(stored, arch, header.path, None, noting=noting, names=names_of(header, arch))


def prequantized(path: Path, arch: Arch) -> Formats:
    """The forms of the roles whose matrices a store holds exactly as they are in the file, in every layer."""
    return _formats(assignments_of(read_header(path), arch), arch)


def _formats(assignments: list[Assignment], arch: Arch) -> Formats:
    kinds: dict[str, set[str]] = {}
    for a in assignments:
        if 0 <= a.spec.layer < arch.num_layers and CODED_ROLES.fullmatch(a.spec.role):
            kinds.setdefault(a.spec.role, set()).add(a.stored[""].dtype)
    forms = {role: _form(found) for role, found in kinds.items()}
    return {role: form for role, form in forms.items() if form is not None}


def _form(kinds: set[str]) -> Form | None:
    """What holds matrices of these types exactly; None where nothing does."""
    if kinds == {FLOAT_BLOCKS}:
        return Form(4, GROUP, floats=True)
    return Form(max(CODE_BITS[kind] for kind in kinds), GROUP) if kinds <= CODE_BITS.keys() else None


def check(path: Path, arch: Arch) -> None:
    """Raises CheckpointError for missing and mis-shaped tensors and a damaged header; no tensor is read."""
    assignments_of(read_header(path), arch)


def stream(path: Path, arch: Arch, skip: Collection[tuple[int, str]], packed: bool) -> Iterator[Any]:
    """Pieces of every tensor, 32 MiB of float32 at a time; with ``packed``, those of `prequantized` roles in codes.
    Raises CheckpointError on the call, before anything of a tensor is read."""
    header = read_header(path)
    assignments = assignments_of(header, arch, noting=True)
    formats = _formats(assignments, arch) if packed else {}
    told = _summary(assignments, formats) if packed else None
    if told is not None:
        logger.info("%s: %s", path, told)
    turned = family_of(header).turned
    wanted = [a for a in assignments if (a.spec.layer, a.spec.role) not in skip]
    whole = [a for a in wanted if not a.row.says("left", "right")]
    pieces = (_pieces(a, arch, formats.get(a.spec.role), turned) for a in whole)
    return chain(chain.from_iterable(pieces), _beside([a for a in wanted if a.row.says("left", "right")]))


def _beside(halves: list[Assignment]) -> Iterator[Piece]:
    """What has a half of its columns from each of two tensors."""
    order = sorted(halves, key=lambda a: (a.spec.layer, a.spec.role, a.row.says("right")))
    for left, right in zip(order[::2], order[1::2], strict=True):
        parts = [a.stored[""] for a in (left, right)]
        values = [numbers(raw_rows(part, 0, part.shape[0]), part.dtype).float() for part in parts]
        yield Piece(left.spec.layer, left.spec.role, None, torch.cat(values, dim=1))


def summary(path: Path, arch: Arch, kept: Collection[str]) -> str | None:
    """How many matrices in blocks are kept, by their roles, and how many are expanded; None: there are none."""
    return _summary(assignments_of(read_header(path), arch), kept)


def _summary(assignments: list[Assignment], roles: Collection[str]) -> str | None:
    matrices = [a for a in assignments if a.stored[""].dtype not in FLOATS]
    kept = Counter(a.stored[""].dtype for a in matrices if a.spec.role in roles)
    expanded = Counter(a.stored[""].dtype for a in matrices if a.spec.role not in roles)
    return kept_and_expanded(kept, expanded) if matrices else None


def _pieces(assignment: Assignment, arch: Arch, form: Form | None, turned: bool) -> Iterator[Piece | QuantizedPiece]:
    """One stored tensor, some rows at a time."""
    stored, spec = assignment.stored[""], assignment.spec
    rows, columns = rows_and_columns(stored)
    turns = turned and assignment.row.part in ("q", "k")
    unit = arch.head_dim if turns else 1
    step = max(1, CHUNK_BYTES // (4 * columns * unit)) * unit
    for begin, end, first in _runs(assignment, arch, rows):
        for start in range(begin, end, step):
            raw = raw_rows(stored, start, min(start + step, end))
            raw = halves(raw, arch.head_dim) if turns else raw
            target = slice(first + start - begin, first + start - begin + len(raw))
            if form is None:
                yield _numbers(assignment, arch, raw, target)
                continue
            in_form = floats_and_scales(stored, raw) if form.floats else None
            codes, parameters = in_form or codes_and_parameters(raw, stored.dtype, form.bits)
            yield QuantizedPiece(spec.layer, spec.role, target, codes, parameters, *form)


def _runs(assignment: Assignment, arch: Arch, rows: int) -> Iterator[tuple[int, int, int]]:
    """Rows of a stored tensor that follow each other in the canonical one, and the first of these there: (first, end,
    first there), of each expert or of all."""
    spec, row, experts = assignment.spec, assignment.row, assignment.source_experts
    first = assignment.rows.start if assignment.rows is not None else 0
    if experts is None or arch.experts is None:
        yield 0, rows, first
        return
    of_expert, stride = rows // arch.experts.count, sum(spec.sections[: parts_of_expert(row)])
    for index, expert in enumerate(range(experts.start, experts.stop)):
        yield expert * of_expert, (expert + 1) * of_expert, first + index * stride


def _numbers(assignment: Assignment, arch: Arch, raw: np.ndarray, target: slice) -> Piece:
    stored, spec = assignment.stored[""], assignment.spec
    values = numbers(raw, stored.dtype)
    if spec.role.endswith("norm.weight") and arch.norm_offset:
        values = values.float() - arch.norm_offset  # the converter added it
    if assignment.row.says("vector"):
        values, target = values.reshape(spec.shape), slice(0, spec.shape[0])
    elif len(spec.shape) == 1:
        first, whole = target.start, len(raw) == 1
        values = values.reshape(-1)
        target = slice(first, first + len(values)) if whole else target
    return Piece(spec.layer, spec.role, target, values, from_codes=stored.dtype not in FLOATS)


def halves(raw: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of queries or keys in which neighbors are rotated together -> in which the two halves of a head are: what
    the converter of Llama's files did, undone."""
    heads = raw.reshape(-1, head_dim // 2, 2, raw.shape[1])
    return heads.swapaxes(1, 2).reshape(raw.shape)
