"""The assignment of stored tensors to rows of canonical ones: decided, and checked for completeness, from names and
shapes alone.

Values are compared only where two tensors have the same destination.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from flexbatch.models.arch import Arch
from flexbatch.models.families import FAMILIES, source_names
from flexbatch.models.module_names import BUFFERS, ModuleMapping
from flexbatch.models.quantized.config import SUFFIXES, UNUSED, Quantization
from flexbatch.models.quantized.scheme import Scheme, module_of
from flexbatch.models.source import StoredTensor, equal, read_tensors
from flexbatch.models.source_rows import (
    Names,
    check_complete,
    class_of,
    parts_of_expert,
    rows_of,
    section,
    source_shape,
    stored_rows,
)
from flexbatch.models.specs import WeightSpec, weight_specs
from flexbatch.validation.errors import CheckpointError

logger = logging.getLogger("flexbatch")

NUMBERS = re.compile(r"(BF16|F16|F32|F64|torch\.(bfloat16|float16|float32|float64))$|I?Q\d|TQ\d|MXFP")
"""The types of weights that mean what they are, as safetensors, torch and GGUF files write them. Floats of 8 bits have
scales."""


@dataclass(frozen=True)
class Assignment:
    """The source of one canonical tensor, or of a part. stored: one tensor as "", or those of a matrix in codes by what
    follows the module's name. scheme: what the codes mean; None: they are numbers."""

    stored: dict[str, StoredTensor]
    spec: WeightSpec
    row: ModuleMapping
    scheme: Scheme | None = None

    @property
    def rows(self) -> slice | None:
        """Destination rows, None for all of them."""
        return section(self.spec, self.row)

    @property
    def source_experts(self) -> slice | None:
        """Which experts of a stored tensor that holds them all, None for any other tensor."""
        if not self.row.role.startswith("experts.") or not self.row.says("stacked", "flat"):
            return None
        first = int(self.row.role.split(".")[1])
        count = len(self.spec.sections) // parts_of_expert(self.row) if self.row.says("stacked") else 1
        return slice(first + self.row.expert, first + self.row.expert + count)

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs and inputs of a matrix in codes, whose rows are outputs in every family; of one expert where it is
        stored with all others."""
        rows, columns = self.spec.shape
        if self.row.says("stacked", "heads"):
            return stored_rows(self.spec, self.row), columns
        return (rows if self.rows is None else self.rows.stop - self.rows.start), columns

    @property
    def module(self) -> str:
        """The module's name in the files."""
        return module_of(next(iter(self.stored.values())).name, self.scheme.suffixes if self.scheme else ())


def assign(
    stored: Iterable[StoredTensor],
    arch: Arch,
    folder: Path,
    quantization: Quantization | None,
    *,
    noting: bool = False,
    names: Names | None = None,
) -> list[Assignment]:
    """Raises CheckpointError for missing and mis-shaped tensors, and for two that differ where the model has one.

    With ``noting`` a line of the log says what the files hold beside the model. ``names``: those of the files, where
    they are not the family's.
    """
    assigner = _Assigner(arch, folder, quantization, names)
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

    def __init__(self, arch: Arch, folder: Path, quantization: Quantization | None, names: Names | None) -> None:
        self.arch, self.folder, self.quantization = arch, folder, quantization
        self.suffixes = () if quantization is None else quantization.suffixes
        self.family = FAMILIES[arch.family]
        self.prefixes, self.names = (self.family.prefixes, source_names(arch)) if names is None else ((), names)
        self.specs = {(spec.layer, spec.role): spec for spec in weight_specs(arch)}
        self.assignments: dict[tuple[int, str, tuple[str, int]], Assignment] = {}
        self.modules: dict[tuple[int, str, tuple[str, int]], str] = {}
        """The names of the modules of these, without prefix."""
        self.extra: list[StoredTensor] = []
        self.twice: list[StoredTensor] = []
        self.skipped: list[StoredTensor] = []

    def add(self, tensor: StoredTensor) -> None:
        module = module_of(tensor.name, self.suffixes)
        part = tensor.name.removeprefix(module).removeprefix(".")
        coded = part in self.suffixes
        local = self.local_of_codes(module) if coded else local_name(tensor.name, self.prefixes, self.names)
        if local is None:
            unused = self.quantization is not None and part in UNUSED
            if self.family.skip and self.family.skip.search(tensor.name):
                self.skipped.append(tensor)
            elif not BUFFERS.search(tensor.name) and not unused:
                self.check_extra(tensor)
                self.extra.append(tensor)
            return
        layer, row, kind = self.names[local]
        for each in rows_of(row, self.arch):
            self.add_row(tensor, layer, each, kind, part if coded else "", local)

    def local_of_codes(self, module: str) -> str | None:
        """The name of a module's matrix if the model knows it; that of all experts may be the module's own."""
        found = local_name(f"{module}.weight", self.prefixes, self.names)
        return local_name(module, self.prefixes, self.names) if found is None else found

    def add_row(self, tensor: StoredTensor, layer: int, row: ModuleMapping, kind: str, part: str, local: str) -> None:
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
        self.record(tensor, spec, row, part, local)

    def check_extra(self, tensor: StoredTensor) -> None:
        """Raises CheckpointError for a part of a matrix in codes where the configuration knows of none."""
        if self.quantization is None:
            module = module_of(tensor.name, SUFFIXES)
            coded = tensor.name.removeprefix(module).removeprefix(".") in SUFFIXES
            if coded and self.local_of_codes(module) is not None:
                raise CheckpointError(f"{tensor.file}: tensor {tensor.name} {self.unexplained(None, '')}")

    def record(self, tensor: StoredTensor, spec: WeightSpec, row: ModuleMapping, part: str, local: str) -> None:
        key = (spec.layer, spec.role, row.target)
        stored = self.assignments.setdefault(key, Assignment({}, spec, row)).stored
        module = self.modules.setdefault(key, local)
        if part in stored or module != local:
            first = stored.get(part) or next(iter(stored.values()))
            if not equal(first, tensor):
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name} stands for the same weights as {first.name} in "
                    f"{first.file}, and they differ; remove one of them"
                )
            if tensor.name == first.name:
                self.twice.append(tensor)
            return
        stored[part] = tensor

    def resolved(self, assignment: Assignment, local: str) -> Assignment:
        """Checked against the scheme that its module has, or as numbers. Raises CheckpointError."""
        stored, row = assignment.stored, assignment.row
        scheme = None
        matrix = local.endswith(".weight") or row.says("stacked")
        if self.quantization is not None and matrix and len(assignment.spec.shape) == 2:
            scheme = self.quantization.scheme_of(*self.called(assignment, local))
        if scheme is not None and ("" not in stored or scheme.applies(stored)):
            if row.part == "transposed" and not scheme.turns:
                first = next(iter(stored.values()))
                raise CheckpointError(
                    f"{first.file}: tensor {first.name}: {scheme} is not known of modules that store inputs by outputs"
                )
            experts = self.arch.experts if row.says("stacked") else None
            scheme.check(stored, *assignment.sizes, () if experts is None else (experts.count,))
            return replace(assignment, scheme=scheme)
        codes = next((tensor for part, tensor in stored.items() if part), None)
        if codes is not None and scheme is None:
            raise CheckpointError(f"{codes.file}: tensor {codes.name} {self.unexplained(assignment, local)}")
        tensor, wanted = stored[""], source_shape(assignment.spec, row, self.arch)
        if not NUMBERS.match(tensor.dtype):
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} holds {tensor.dtype}, wanted floating-point numbers of 16 bits "
                f"or more; it {self.unexplained(assignment, local)}"
            )
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, wanted {list(wanted)}"
            )
        return replace(assignment, stored={"": tensor})

    def called(self, assignment: Assignment, local: str) -> tuple[set[str], str]:
        """The names that a list of modules may have for one, and its class in torch."""
        module = local.removesuffix(".weight")
        first = next(iter(assignment.stored.values()))
        names = {module_of(first.name, self.suffixes), *(prefix + module for prefix in (*self.prefixes, ""))}
        return names, class_of(self.names[local][1])

    def unexplained(self, assignment: Assignment | None, local: str) -> str:
        """What is wrong with codes of a module that has no scheme, or does not look like its own."""
        if self.quantization is None or assignment is None:
            return (
                "is in codes, whose scales no quantization_config of config.json explains: take the config.json that "
                "belongs to these files"
            )
        if self.quantization.is_skipped(*self.called(assignment, local)):
            return (
                f"is in codes, but quantization_config.{self.quantization.skip_key} of config.json names its module, "
                "which is not quantized then"
            )
        return (
            f"is in codes, but not as quantization_config of config.json says ({self.quantization}); take the "
            "config.json that belongs to these files"
        )

    def note(self) -> None:
        """What was left alone, in a line for each kind."""
        for tensors, what in (
            (
                self.extra + (self.skipped if self.family.expert_keys else []),
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
        assignments = [self.resolved(found, self.modules[key]) for key, found in self.assignments.items()]
        found: dict[tuple[int, str], set[tuple[str, int]]] = {}
        for a in assignments:
            found.setdefault((a.spec.layer, a.spec.role), set()).add(a.row.target)
        check_complete(found, self.specs, self.names, self.arch, self.folder)
        return assignments
