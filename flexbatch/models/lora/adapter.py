"""An adapter: which low-rank updates it has of which canonical matrices, read from a PEFT folder's headers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.models.arch import Arch
from flexbatch.models.assignment import NUMBERS, local_name
from flexbatch.models.checkpoint import separated
from flexbatch.models.families import FAMILIES, source_names
from flexbatch.models.fingerprint import combined, file_digest
from flexbatch.models.lora.peft_config import MERGE, PeftConfig, read_peft_config
from flexbatch.models.lora.replaced import ReplacedRows
from flexbatch.models.lora.replaced_reader import ReplacedReader, plain_name
from flexbatch.models.lora.request import CONFIG_FILE, LoRARequest
from flexbatch.models.module_names import ModuleMapping
from flexbatch.models.source import StoredTensor, list_file, read_tensors
from flexbatch.models.specs import weight_specs
from flexbatch.validation.errors import CheckpointError

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
LINEAR = frozenset(
    (
        *("qkv", "q", "q_a", "q_b", "kv_a", "o", "gate_up", "up", "down", "shared.gate_up", "shared.down"),
        *("project_in", "project_out", "head"),
    )
)
"""Roles whose update is a product of its input; that of "embed" is of one-hot rows."""
FACTORS = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora_embedding_A": "down", "lora_embedding_B": "up", "lora_embedding_A.default": "down",
    "lora_embedding_B.default": "up",
}  # fmt: skip
"""What a tensor is by the end of its name; with "default" where the state of a model was saved as it is."""
PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up"), "shared.gate_up": ("gate", "up")}


@dataclass(frozen=True)
class LowRank:
    """The update of one matrix, or of one part of a fused one: ``scale * up @ down``. down: [rank, inputs]; up:
    [outputs, rank], both as they are stored, in files."""

    layer: int
    role: str
    part: str
    down: StoredTensor
    up: StoredTensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def outputs(self) -> int:
        return self.up.shape[0]

    def factors(self, arch: Arch) -> tuple[Tensor, Tensor]:
        """(down, up) with the rows of ``up`` in the order of the canonical matrix. Copies."""
        down, up = (value.clone() for _, value in read_tensors((self.down, self.up)))
        if self.part in ("grouped", "codegen"):
            up = torch.cat([part.reshape(-1, up.shape[1]) for part in separated(up, self.part, arch)])
        return down, up


@dataclass(frozen=True)
class Adapter:
    """The updates by (layer, role), each with one for every part of the matrix that was trained."""

    name: str
    folder: Path
    arch: Arch
    updates: tuple[LowRank, ...]
    copies: tuple[tuple[StoredTensor, tuple[int, str]], ...] = ()
    """Tensors of the model itself that PEFT saved beside it, with (layer, role)."""
    replaced: tuple[ReplacedRows, ...] = ()
    """Of the embedding and of the head, at most one each."""

    @property
    def roles(self) -> set[tuple[int, str]]:
        return {(update.layer, update.role) for update in self.updates}

    @property
    def mergeable(self) -> bool:
        """Whether it can be added to the weights: not where the table is the head, too, and only one of both was
        trained, or each by itself."""
        if not self.arch.tie_word_embeddings:
            return True
        alike = len(self.replaced) == 2 and self.replaced[0].weight == self.replaced[1].weight
        return (alike or not self.replaced) and not {role for _, role in self.roles} & {"embed", "head"}

    @cached_property
    def digest(self) -> str:
        """Hex digits of its files' content."""
        return adapter_digest(self.folder)


def adapter_files(folder: Path) -> list[Path]:
    """Its configuration and its weights. Raises CheckpointError."""
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"adapter folder {folder} holds no weights; looked for {', '.join(WEIGHT_FILES)}")
    return [folder / CONFIG_FILE, found]


def adapter_digest(folder: Path, records: Path | None = None) -> str:
    """Hex digits of an adapter's content, the same for a copy of its folder. Raises CheckpointError."""
    paths = adapter_files(folder)
    return combined("adapter", (f"{path.name} {file_digest(path, records)}\n".encode() for path in paths))[:32]


def read_adapter(request: LoRARequest, arch: Arch) -> Adapter:
    """Reads headers only. Raises CheckpointError that names the file, the tensor and both shapes where the adapter is
    not one of this model."""
    folder = Path(request.path).expanduser()
    config = read_peft_config(folder)
    file = adapter_files(folder)[1]
    return _AdapterReader(request.name, folder, file, config, arch).read()


@dataclass(frozen=True)
class _Module:
    """A module of the model by the name that PEFT knows it by, and what it is here."""

    name: str
    layer: int
    row: ModuleMapping
    shape: tuple[int, int]
    """(outputs, inputs)."""


class _AdapterReader:
    def __init__(self, name: str, folder: Path, file: Path, config: PeftConfig, arch: Arch) -> None:
        self.name, self.folder, self.file, self.config, self.arch = name, folder, file, config, arch
        family = FAMILIES[arch.family]
        self.prefixes, self.skip, self.names = family.prefixes, family.skip, source_names(arch)
        self.specs = {(spec.layer, spec.role): spec for spec in weight_specs(arch)}
        self.copies: list[tuple[StoredTensor, tuple[int, str]]] = []
        self.replaced = ReplacedReader(config, arch, self.wrong)

    def read(self) -> Adapter:
        found: dict[str, dict[str, StoredTensor]] = {}
        modules: dict[str, _Module] = {}
        for tensor in list_file(self.file):
            name = tensor.name.removeprefix(PREFIX)
            if self.skip is not None and self.skip.search(name):
                continue  # the part of the model that sees images is not run
            end = next((end for end in FACTORS if name.endswith(f".{end}")), None)
            if end is None:
                self.add_copy(tensor, name)
                continue
            module = self.module(tensor, name.removesuffix(f".{end}"))
            modules[module.name] = module
            found.setdefault(module.name, {})[FACTORS[end]] = tensor
        replaced = self.replaced.read()
        if not found and not replaced:
            raise self.wrong("holds no lora_A and lora_B tensors")
        self.check_complete(found, modules)
        updates = tuple(self.update(modules[name], found[name]) for name in found)
        return Adapter(self.name, self.folder, self.arch, updates, tuple(self.copies), replaced)

    def wrong(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: adapter {self.name!r} {problem}")

    def module(self, tensor: StoredTensor, name: str) -> _Module:
        local = local_name(f"{name}.weight", self.prefixes, self.names)
        layer, row, _ = self.names[local] if local is not None else (0, ModuleMapping("", ""), "")
        if row.is_shared:
            raise self.wrong(f"has a tensor {tensor.name}, and {row.module} cannot have a low-rank update; {MERGE}")
        if local is None or ((layer, f"{row.role}.weight") not in self.specs and row.role != "head"):
            layers = f"{self.arch.num_layers} layer{'s' if self.arch.num_layers > 1 else ''}"
            raise self.wrong(
                f"was trained for another model: tensor {tensor.name} {list(tensor.shape)} belongs to no module of a "
                f"{self.arch.family} model with {layers}"
            )
        if row.role not in LINEAR and row.role != "embed":
            raise self.wrong(f"has a tensor {tensor.name}, and {row.role} cannot have a low-rank update; {MERGE}")
        return _Module(name, layer, row, self.shape_of(layer, row))

    def shape_of(self, layer: int, row: ModuleMapping) -> tuple[int, int]:
        """(outputs, inputs) of a module. A head that is the table has the table's."""
        spec = self.specs.get((layer, f"{row.role}.weight")) or self.specs[-1, "embed.weight"]
        if row.role == "embed":
            return spec.shape[1], spec.shape[0]
        if row.part in PARTS.get(row.role, ()):
            return spec.sections[PARTS[row.role].index(row.part)], spec.shape[1]
        return spec.shape[0], spec.shape[1]

    def add_copy(self, tensor: StoredTensor, name: str) -> None:
        """A table that was trained, or one of the model itself: PEFT saves embeddings with an update whole. Anything
        else is refused."""
        local = local_name(plain_name(name), self.prefixes, self.names)
        row = None if local is None else self.names[local][1]
        if row is not None and self.replaced.takes(tensor, name, row.role):
            return
        if local is None or row is None or row.role not in ("embed", "head") or not local.endswith(".weight"):
            kind = "DoRA is not supported" if "magnitude" in name else "it is neither lora_A nor lora_B of a module"
            raise self.wrong(f"has a tensor {tensor.name} {list(tensor.shape)}: {kind}; {MERGE}")
        spec = self.specs.get((self.names[local][0], f"{row.role}.weight")) or self.specs[-1, "embed.weight"]
        if tensor.shape != spec.shape:
            raise self.wrong(
                f"has a tensor {tensor.name} of shape {list(tensor.shape)}, the model's is {list(spec.shape)}: its "
                f"vocabulary was changed; {MERGE}"
            )
        self.copies.append((tensor, (spec.layer, spec.role)))

    def update(self, module: _Module, factors: dict[str, StoredTensor]) -> LowRank:
        rank = self.config.rank_of(module.name)
        outputs, inputs = module.shape
        for factor, shape in (("down", (rank, inputs)), ("up", (outputs, rank))):
            tensor = factors[factor]
            if tensor.shape != shape:
                raise self.wrong(
                    f"does not fit the model: tensor {tensor.name} has shape {list(tensor.shape)}, wanted "
                    f"{list(shape)} (rank {rank} by {CONFIG_FILE}, a module with {inputs} inputs and {outputs} outputs)"
                )
            if not NUMBERS.match(tensor.dtype):
                raise self.wrong(f"has a tensor {tensor.name} of {tensor.dtype}, wanted floating-point numbers")
        scale = self.config.scale_of(module.name)
        return LowRank(module.layer, module.row.role, module.row.part, factors["down"], factors["up"], scale)

    def check_complete(self, found: dict[str, dict[str, StoredTensor]], modules: dict[str, _Module]) -> None:
        """Raises CheckpointError where a module that adapter_config.json names lacks its tensors, or one of both."""
        for name, factors in found.items():
            if len(factors) < 2:
                (tensor,) = factors.values()
                raise self.wrong(f"has a tensor {tensor.name}, but not the other factor of {name}")
        first = next((name for name, module in modules.items() if module.row.role != "head"), "")
        local = local_name(f"{first}.weight", self.prefixes, self.names)
        prefix = self.prefixes[0] if local is None else first[: len(first) + len(".weight") - len(local)]
        # A module may have two names, that of older versions of transformers and that of newer ones.
        known = {(module.layer, module.row.role, module.row.target) for module in modules.values()}
        missing = [name for name, key in self.targeted(prefix) if key not in known]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise self.wrong(f"lacks tensors of {', '.join(missing[:3])}{more}, which its target_modules name")

    def targeted(self, prefix: str) -> Iterator[tuple[str, tuple[int, str, tuple[str, int]]]]:
        """Modules of the model that adapter_config.json names, and what they are here."""
        for local, (layer, row, suffix) in self.names.items():
            linear = row.role in LINEAR
            spec = self.specs.get((layer, f"{row.role}.weight"))
            if suffix != ".weight" or not (linear or row.role == "embed") or (spec is None and row.role != "head"):
                continue
            # The head stands beside the model that has the prefix.
            name = local.removesuffix(suffix)
            full = name if row.role == "head" else f"{prefix}{name}"
            if self.config.targets(full, linear and row.role != "head"):
                yield full, (layer, row.role, row.target)
