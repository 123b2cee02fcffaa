"""Which stored tensor fills which rows of which canonical one; decided, and checked for completeness, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from flexbatch.models.arch import Arch
from flexbatch.models.errors import CheckpointError
from flexbatch.models.families import BUFFERS, FAMILIES, Row, source_names
from flexbatch.models.packed import SUFFIXES, Packing
from flexbatch.models.source import StoredTensor, read_tensors, sample_rows
from flexbatch.models.specs import WeightSpec, weight_specs


@dataclass(frozen=True)
class Assignment:
    """The source of one canonical tensor, or of a part. stored: one tensor, or the packed ones of a quantised matrix under their suffixes."""

    stored: dict[str, StoredTensor]
    spec: WeightSpec
    row: Row

    @property
    def rows(self) -> slice | None:
        """Destination rows, None for all of them."""
        return _section(self.spec, self.row.part)


def assign(stored: Iterable[StoredTensor], arch: Arch, folder: Path, packing: Packing | None) -> list[Assignment]:
    """Raises CheckpointError for missing, extra and mis-shaped tensors."""
    assigner = _Assigner(arch, folder, packing)
    for tensor in stored:
        assigner.add(tensor)
    return assigner.finish()


class _Assigner:
    """Collects assignments tensor by tensor."""

    def __init__(self, arch: Arch, folder: Path, packing: Packing | None) -> None:
        self.arch, self.folder, self.packing = arch, folder, packing
        self.family, self.names = FAMILIES[arch.family], source_names(arch)
        self.specs = {(spec.layer, spec.role): spec for spec in weight_specs(arch)}
        self.assignments: dict[tuple[int, str, str], Assignment] = {}

    def add(self, tensor: StoredTensor) -> None:
        stem, _, suffix = tensor.name.rpartition(".")
        packed = self.packing is not None and suffix in SUFFIXES
        local = self.local_name(f"{stem}.weight" if packed else tensor.name)
        described = f"{tensor.file}: tensor {tensor.name} {list(tensor.shape)}"
        if local is None:
            if BUFFERS.search(tensor.name) or (self.family.skip and self.family.skip.search(tensor.name)):
                return
            raise CheckpointError(f"{described} is not part of a {self.arch.family} model with {self.arch.num_layers} layers")
        layer, row, kind = self.names[local]
        if self.arch.tie_word_embeddings and row.role == "head" and kind == ".weight":
            layer, row = -1, Row(row.module, "embed")
        spec = self.specs.get((layer, row.role + kind))
        if spec is None:
            if self.packing is not None and kind == ".bias" and not any(value.any() for _, value in read_tensors([tensor])):
                return  # quantisers give every matrix a bias, zero where the model has none
            raise CheckpointError(f"{described} is not expected: by config.json this model has no {row.role}{kind}")
        self.record(tensor, spec, row, suffix if packed else "")

    def record(self, tensor: StoredTensor, spec: WeightSpec, row: Row, suffix: str) -> None:
        earlier = self.assignments.setdefault((spec.layer, spec.role, row.part), Assignment({}, spec, row)).stored
        if earlier and (suffix in earlier or "" in (suffix, *earlier)):
            first = next(iter(earlier.values()))
            if spec.role != "embed.weight":
                raise CheckpointError(f"{tensor.file}: tensor {tensor.name} stands for the same weights as {first.name} in {first.file}")
            _check_tied(first, tensor, self.folder)
            return
        wanted = _source_shape(spec, row)
        if suffix and self.packing is not None:
            try:
                wanted = self.packing.shapes(*(spec.shape if row.part == "transposed" else wanted))[suffix]  # packed, outputs are rows in every family
            except ValueError as error:
                raise CheckpointError(f"{tensor.file}: tensor {tensor.name} cannot be right: {error}") from error
        if tensor.shape != wanted:
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, wanted {list(wanted)}")
        earlier[suffix] = tensor

    def local_name(self, name: str) -> str | None:
        """Name without the prefix that it came with, if the model knows it."""
        shorter = (name.removeprefix(prefix) for prefix in (*self.family.prefixes, "") if name.startswith(prefix))
        return next((local for local in shorter if local in self.names), None)

    def finish(self) -> list[Assignment]:
        found: dict[tuple[int, str], set[str]] = {}
        for a in self.assignments.values():
            found.setdefault((a.spec.layer, a.spec.role), set()).add(a.row.part)
            lacking = [part for part in SUFFIXES[:3] if "" not in a.stored and part not in a.stored]
            if lacking:
                first = next(iter(a.stored.values()))
                raise CheckpointError(f"{first.file}: {first.name} is there, but the weight files lack {first.name.rpartition('.')[0]}.{lacking[0]}")
        _check_complete(found, self.specs, self.names, self.folder)
        return list(self.assignments.values())


def _check_tied(first: StoredTensor, second: StoredTensor, folder: Path) -> None:
    """A tied matrix may be stored twice; 64 rows tell whether it was in truth untied, as fine-tuning sometimes does without a word in the config."""
    if first.shape != second.shape or not torch.equal(sample_rows(first), sample_rows(second)):
        raise CheckpointError(
            f"{folder / 'config.json'} says tie_word_embeddings, but {first.name} {list(first.shape)} and {second.name} {list(second.shape)} differ; "
            'write "tie_word_embeddings": false there to use both'
        )


def _check_complete(
    found: dict[tuple[int, str], set[str]], specs: dict[tuple[int, str], WeightSpec], names: dict[str, tuple[int, Row, str]], folder: Path
) -> None:
    """found: the parts that are there of every canonical tensor."""
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
    rows = _section(spec, row.part)
    if row.part == "transposed":
        return spec.shape[::-1]
    return spec.shape if rows is None else (rows.stop - rows.start, *spec.shape[1:])


def _section(spec: WeightSpec, part: str) -> slice | None:
    """Destination rows of a part."""
    index = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}.get(part)
    if index is None:
        return None
    start = sum(spec.sections[:index])
    return slice(start, start + spec.sections[index])
