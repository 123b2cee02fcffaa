"""The assignment of stored tensors to rows of canonical ones: decided, and checked for completeness, from names and
shapes alone.

Values are compared only where two tensors have the same destination.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flexbatch.models.arch import Arch
from flexbatch.models.families import FAMILIES, source_names
from flexbatch.models.module_names import BUFFERS, ModuleMapping
from flexbatch.models.packed import SUFFIXES, Packing
from flexbatch.models.source import StoredTensor, equal, read_tensors
from flexbatch.models.specs import WeightSpec, weight_specs
from flexbatch.validation.errors import CheckpointError

logger = logging.getLogger("flexbatch")

NUMBERS = re.compile(r"B?F\d|torch\.b?float|I?Q\d|TQ\d|MXFP")
"""The types of weights that are numbers, as safetensors, torch and GGUF files write them."""


@dataclass(frozen=True)
class Assignment:
    """The source of one canonical tensor, or of a part. stored: one tensor, or the packed ones of a quantized matrix
    under their suffixes."""

    stored: dict[str, StoredTensor]
    spec: WeightSpec
    row: ModuleMapping

    @property
    def rows(self) -> slice | None:
        """Destination rows, None for all of them."""
        return _section(self.spec, self.row)

    @property
    def source_experts(self) -> slice | None:
        """Which experts of a stored tensor that holds them all, None for any other tensor."""
        if self.row.part != "stacked":
            return None
        first = int(self.row.role.split(".")[1])
        return slice(first, first + len(self.spec.sections) // _parts_of_expert(self.row))


Names = dict[str, tuple[int, ModuleMapping, str]]
"""Tensor name -> (stage, row, ``.weight`` or ``.bias``)."""


def assign(
    stored: Iterable[StoredTensor],
    arch: Arch,
    folder: Path,
    packing: Packing | None,
    *,
    noting: bool = False,
    names: Names | None = None,
) -> list[Assignment]:
    """Raises CheckpointError for missing and mis-shaped tensors, and for two that differ where the model has one.

    With ``noting`` a line of the log says what the files hold beside the model. ``names``: those of the files, where
    they are not the family's.
    """
    assigner = _Assigner(arch, folder, packing, names)
    for tensor in stored:
        assigner.add(tensor)
    assignments = assigner.finish()
    if noting:
        assigner.note()
    return assignments


def untied(
    stored: Iterable[StoredTensor], arch: Arch, names: Names | None = None
) -> tuple[StoredTensor, StoredTensor] | None:
    """The embedding and the head where the config ties them and the files hold two different ones; transformers then
    uses both. ``names`` as in `assign`."""
    if not arch.tie_word_embeddings:
        return None
    family = FAMILIES[arch.family]
    prefixes, names = (family.prefixes, source_names(arch)) if names is None else ((), names)
    found: dict[str, StoredTensor] = {}
    for tensor in stored:
        local = local_name(tensor.name, prefixes, names)
        if local is not None and names[local][2] == ".weight" and names[local][1].role in ("embed", "head"):
            found.setdefault(names[local][1].role, tensor)
    if len(found) < 2 or equal(found["embed"], found["head"]):
        return None
    return found["embed"], found["head"]


def local_name(name: str, prefixes: tuple[str, ...], names: Names) -> str | None:
    """Name without the prefix that it came with, if the model knows it."""
    shorter = (name.removeprefix(prefix) for prefix in (*prefixes, "") if name.startswith(prefix))
    return next((local for local in shorter if local in names), None)


class _Assigner:
    """Collects assignments tensor by tensor."""

    def __init__(self, arch: Arch, folder: Path, packing: Packing | None, names: Names | None) -> None:
        self.arch, self.folder, self.packing = arch, folder, packing
        self.family = FAMILIES[arch.family]
        self.prefixes, self.names = (self.family.prefixes, source_names(arch)) if names is None else ((), names)
        self.specs = {(spec.layer, spec.role): spec for spec in weight_specs(arch)}
        self.assignments: dict[tuple[int, str, tuple[str, int]], Assignment] = {}
        self.extra: list[StoredTensor] = []
        self.twice: list[StoredTensor] = []

    def add(self, tensor: StoredTensor) -> None:
        stem, _, suffix = tensor.name.rpartition(".")
        packed = self.packing is not None and suffix in SUFFIXES
        local = local_name(f"{stem}.weight" if packed else tensor.name, self.prefixes, self.names)
        if local is None:
            if not BUFFERS.search(tensor.name) and not (self.family.skip and self.family.skip.search(tensor.name)):
                self.extra.append(tensor)
            return
        layer, row, kind = self.names[local]
        for each in _rows(row, self.arch):
            self.add_row(tensor, layer, each, kind, suffix if packed else "")

    def add_row(self, tensor: StoredTensor, layer: int, row: ModuleMapping, kind: str, suffix: str) -> None:
        if self.arch.tie_word_embeddings and row.role == "head" and kind == ".weight":
            layer, row = -1, ModuleMapping(row.module, "embed")
        spec = self.specs.get((layer, row.role + kind))
        if spec is None:
            if kind == ".bias" and not any(value.any() for _, value in read_tensors([tensor])):
                return  # quantizers give every matrix a bias, zero where the model has none
            described = f"{tensor.file}: tensor {tensor.name} {list(tensor.shape)}"
            raise CheckpointError(
                f"{described} is not expected: by its configuration this model has no {row.role}{kind}"
            )
        self.record(tensor, spec, row, suffix)

    def record(self, tensor: StoredTensor, spec: WeightSpec, row: ModuleMapping, suffix: str) -> None:
        earlier = self.assignments.setdefault((spec.layer, spec.role, row.target), Assignment({}, spec, row)).stored
        if earlier and (suffix in earlier or "" in (suffix, *earlier)):
            first = earlier.get(suffix) or next(iter(earlier.values()))
            if not equal(first, tensor):
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name} stands for the same weights as {first.name} in "
                    f"{first.file}, and they differ; remove one of them"
                )
            if tensor.name == first.name:
                self.twice.append(tensor)
            return
        wanted = _source_shape(spec, row, self.arch)
        if suffix and self.packing is not None:
            try:
                wanted = self.packing.shapes(*(spec.shape if row.part == "transposed" else wanted))[
                    suffix
                ]  # packed, outputs are rows in every family
            except ValueError as error:
                raise CheckpointError(f"{tensor.file}: tensor {tensor.name} cannot be right: {error}") from error
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, wanted {list(wanted)}"
            )
        if not suffix and not NUMBERS.match(tensor.dtype):
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} holds {tensor.dtype}, wanted floating-point numbers; integers "
                "are codes, whose scales no quantization_config of config.json explains"
            )
        earlier[suffix] = tensor

    def note(self) -> None:
        """What was left alone, in a line for each kind."""
        for tensors, what in (
            (
                self.extra,
                f"tensors that are not part of a {self.arch.family} model with {self.arch.num_layers} layers "
                "are not used",
            ),
            (self.twice, "tensors are stored alike in two files, and read from the first"),
        ):
            if tensors:
                names = ", ".join(f"{tensor.name} {list(tensor.shape)} in {tensor.file.name}" for tensor in tensors[:5])
                rest = f" and {len(tensors) - 5} more" if len(tensors) > 5 else ""
                logger.warning("%s: %d %s: %s%s", self.folder, len(tensors), what, names, rest)

    def refuse_extra(self) -> None:
        """Of a family with experts every tensor is known: one that is not may be an expert, a shared MLP or a bias that
        the model would compute without."""
        if not self.family.expert_keys or not self.extra:
            return
        skipped = tuple(
            f"{prefix}{self.family.blocks}.{self.arch.num_layers + index}."
            for prefix in self.prefixes
            for index in range(self.arch.skipped_layers)
        )
        unknown = [tensor for tensor in self.extra if not tensor.name.startswith(skipped)]
        if unknown:
            first = unknown[0]
            raise CheckpointError(
                f"{first.file}: {len(unknown)} tensors are not part of a {self.arch.family} model with "
                f"{self.arch.num_layers} layers by its configuration, e.g. {first.name} {list(first.shape)}; remove "
                "them, or correct config.json"
            )

    def finish(self) -> list[Assignment]:
        self.refuse_extra()
        found: dict[tuple[int, str], set[tuple[str, int]]] = {}
        for a in self.assignments.values():
            found.setdefault((a.spec.layer, a.spec.role), set()).add(a.row.target)
            lacking = [part for part in SUFFIXES[:3] if "" not in a.stored and part not in a.stored]
            if lacking:
                first = next(iter(a.stored.values()))
                raise CheckpointError(
                    f"{first.file}: {first.name} is there, but the weight files lack "
                    f"{first.name.rpartition('.')[0]}.{lacking[0]}"
                )
        _check_complete(found, self.specs, self.names, self.arch, self.folder)
        return list(self.assignments.values())


def _check_complete(
    found: dict[tuple[int, str], set[tuple[str, int]]],
    specs: dict[tuple[int, str], WeightSpec],
    names: Names,
    arch: Arch,
    folder: Path,
) -> None:
    """found: the parts that are there of every canonical tensor."""
    candidates: dict[tuple[int, str], list[tuple[str, ModuleMapping]]] = {}
    for name, (layer, row, suffix) in names.items():
        for each in _rows(row, arch):
            candidates.setdefault((layer, each.role + suffix), []).append((name, each))
    missing = []
    for key, spec in specs.items():
        wanted, parts = {row.target for _, row in candidates[key]}, found.get(key, set())
        if parts != wanted:
            missing += [
                f"{name} {list(_source_shape(spec, row, arch))}"
                for name, row in candidates[key]
                if row.target not in parts
            ]
    if missing:
        missing = list(dict.fromkeys(missing))  # a tensor of all experts lacks in every part of them
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"{folder}: the weight files lack {', '.join(missing[:5])}{rest}")


def _rows(row: ModuleMapping, arch: Arch) -> tuple[ModuleMapping, ...]:
    """The row, or of a tensor with all experts one for each of their parts."""
    return row.of_experts(arch.experts.units) if row.part == "stacked" and arch.experts else (row,)


def _parts_of_expert(row: ModuleMapping) -> int:
    """Sections of one expert in its role's tensor: gate and up are two."""
    return 2 if row.role.endswith("gate_up") else 1


def _source_shape(spec: WeightSpec, row: ModuleMapping, arch: Arch) -> tuple[int, ...]:
    rows = _section(spec, row)
    if row.part == "stacked":
        assert arch.experts is not None
        return arch.experts.count, sum(spec.sections[: _parts_of_expert(row)]), *spec.shape[1:]
    if row.part == "transposed":
        return spec.shape[::-1]
    return spec.shape if rows is None else (rows.stop - rows.start, *spec.shape[1:])


def _section(spec: WeightSpec, row: ModuleMapping) -> slice | None:
    """Destination rows of a part, or of one expert's."""
    index = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1, "expert": 0}.get(row.part)
    if index is None:
        return None
    index += row.expert * _parts_of_expert(row)
    start = sum(spec.sections[:index])
    return slice(start, start + spec.sections[index])
