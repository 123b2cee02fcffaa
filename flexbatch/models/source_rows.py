"""Where rows of stored tensors go in the canonical ones, their shapes, and whether all of them are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flexbatch.models.arch import Arch
from flexbatch.models.module_names import ModuleMapping
from flexbatch.models.specs import WeightSpec
from flexbatch.validation.errors import CheckpointError

Names = dict[str, tuple[int, ModuleMapping, str]]
"""Tensor name -> (stage, row, ``.weight`` or ``.bias``)."""


def check_complete(
    found: dict[tuple[int, str], set[tuple[str, int]]],
    specs: dict[tuple[int, str], WeightSpec],
    names: Names,
    arch: Arch,
    folder: Path,
) -> None:
    """found: the parts that are there of every canonical tensor."""
    candidates: dict[tuple[int, str], list[tuple[str, ModuleMapping]]] = {}
    for name, (layer, row, suffix) in names.items():
        for each in rows_of(row, arch):
            candidates.setdefault((layer, each.role + suffix), []).append((name, each))
    missing = []
    for key, spec in specs.items():
        wanted, parts = {row.target for _, row in candidates[key]}, found.get(key, set())
        if parts != wanted:
            missing += [
                f"{name} {list(source_shape(spec, row, arch))}"
                for name, row in candidates[key]
                if row.target not in parts
            ]
    if missing:
        missing = list(dict.fromkeys(missing))  # a tensor of all experts lacks in every part of them
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"{folder}: the weight files lack {', '.join(missing[:5])}{rest}")


def rows_of(row: ModuleMapping, arch: Arch) -> tuple[ModuleMapping, ...]:
    """The row, or of a tensor that fills several roles one for each."""
    if row.says("heads"):
        assert arch.latent is not None
        heads = arch.latent.nope, arch.latent.value
        return replace(row, role="k_up", heads=heads), replace(row, role="v_up", heads=heads)
    return row.of_experts(arch.experts.units) if row.is_shared and arch.experts else (row,)


def parts_of_expert(row: ModuleMapping) -> int:
    """Sections of one expert in its role's tensor: gate and up are two."""
    return 2 if "gate_up" in row.role else 1


def sections_of_expert(spec: WeightSpec, row: ModuleMapping) -> slice:
    """Those of the first expert that a tensor of all experts fills: gate and up, or one of both."""
    offset = next((offset for offset, part in enumerate(("gate", "up")) if row.says(part)), None)
    return slice(0, parts_of_expert(row)) if offset is None else slice(offset, offset + 1)


def source_shape(spec: WeightSpec, row: ModuleMapping, arch: Arch) -> tuple[int, ...]:
    rows = section(spec, row)
    if row.says("heads"):
        return stored_rows(spec, row), *spec.shape[1:]
    if row.is_shared:
        assert arch.experts is not None
        parts = sections_of_expert(spec, row) if row.says("stacked") else slice(0, 1)
        shape = sum(spec.sections[parts]), *spec.shape[1:]
        shape = shape[::-1] if row.says("turned") else shape
        return (arch.experts.count, *shape) if row.says("stacked") else (arch.experts.count * shape[0], *shape[1:])
    if row.says("row"):
        return 1, *spec.shape
    if row.says("vector"):
        return spec.shape[1:]
    if row.says("left", "right"):
        return spec.shape[0], spec.shape[1] // 2
    if row.part == "transposed":
        return spec.shape[::-1]
    return spec.shape if rows is None else (rows.stop - rows.start, *spec.shape[1:])


def rows_of_head(row: ModuleMapping) -> slice:
    """Those of a head that fill the role, of a tensor that holds keys and values by head."""
    keys, values = row.heads
    return slice(0, keys) if row.role == "k_up" else slice(keys, keys + values)


def stored_rows(spec: WeightSpec, row: ModuleMapping) -> int:
    """Rows of a tensor that holds keys and values by head, and of one expert in one that holds all."""
    if row.says("stacked"):
        return sum(spec.sections[sections_of_expert(spec, row)])
    part = rows_of_head(row)
    return spec.shape[0] // (part.stop - part.start) * sum(row.heads)


def section(spec: WeightSpec, row: ModuleMapping) -> slice | None:
    """Destination rows of a part, or of one expert's."""
    offsets = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1, "expert": 0}
    index = next((offset for part, offset in offsets.items() if row.says(part)), None)
    if index is None:
        return None
    index += row.expert * parts_of_expert(row)
    start = sum(spec.sections[:index])
    return slice(start, start + spec.sections[index])


def class_of(row: ModuleMapping) -> str:
    """The class of a module in torch and transformers."""
    return "Embedding" if row.role in ("embed", "pos_embed") else "Conv1D" if row.part == "transposed" else "Linear"
