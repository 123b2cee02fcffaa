"""The adapters that settings and requests name: read, checked against the model, merged where one is for all."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.config import EngineConfig
from flexbatch.models.gguf.parts import is_gguf
from flexbatch.models.lora.adapter import MERGE, Adapter, read_adapter
from flexbatch.models.lora.adapter_set import AdapterSet
from flexbatch.models.lora.replaced_reader import own_rows
from flexbatch.models.lora.request import LoRARequest, check_default, parse_loras
from flexbatch.models.opened import OpenModel
from flexbatch.models.source import read_tensors
from flexbatch.models.specs import Piece, weight_specs
from flexbatch.validation.errors import CheckpointError, ConfigurationError

logger = logging.getLogger("flexbatch")


def configured(config: EngineConfig, model: OpenModel) -> tuple[OpenModel, AdapterSet]:
    """The model and the adapters of the settings. One that is for all requests is merged into weights of 16 or 32 bits,
    and the model has it then. Raises CheckpointError for a bad adapter, ConfigurationError for wrong settings."""
    requests = parse_loras(config.lora)
    adapters = tuple(checked(request, model) for request in requests)
    default = config.lora_default
    check_default(default, [adapter.name for adapter in adapters])
    if default is None or len(adapters) > 1 or not can_merge(config, model, adapters[0]):
        return model, AdapterSet(model.arch, adapters, None, default)
    logger.info("adapter %r is merged into the weights", default)
    return replace(model, adapter=adapters[0]), AdapterSet(model.arch, (), adapters[0], default)


def can_merge(config: EngineConfig, model: OpenModel, adapter: Adapter) -> bool:
    """Whether every weight that it changes is kept as it is: quantizing the sum again would lose more than quantizing
    the weights alone."""
    return config.weight_bits == 16 and not config.allow_bits and not model.prequantized and adapter.mergeable


def checked(request: LoRARequest, model: OpenModel) -> Adapter:
    """An adapter whose copies of the model's own tensors are the model's, without the rows of trained tables that are.
    Raises CheckpointError."""
    adapter = read_adapter(request, model.arch)
    # A GGUF file may hold its tables in codes, which no copy equals.
    if model.folder is None or is_gguf(model.folder):
        return adapter
    return without_own_rows(with_own_copies(adapter, model), model)


def own_tensors(model: OpenModel, keys: Collection[tuple[int, str]]) -> Iterator[Piece]:
    """Some of the model's tensors, in the dtype of its files."""
    others = {(spec.layer, spec.role) for spec in weight_specs(model.arch)} - set(keys)
    for piece in model.pieces(others, 0, torch.float32) if keys else ():
        assert isinstance(piece, Piece)
        yield piece


def without_own_rows(adapter: Adapter, model: OpenModel) -> Adapter:
    """A table that was trained whole has most rows of the model where few tokens were trained: they are not kept."""
    head = {spec.role for spec in weight_specs(model.arch)} & {"head.weight", "head.bias"}
    keys = {(-1, "embed.weight")} | {(model.arch.num_layers, role) for role in head}
    own = {piece.role: piece.tensor for piece in own_tensors(model, keys if adapter.replaced else ())}
    if any(len(tensor) != model.arch.vocab_size for tensor in own.values()):
        return adapter
    kept = []
    for rows in adapter.replaced:
        weight = own.get(f"{rows.role}.weight", own["embed.weight"])[rows.tokens]
        bias = own[f"{rows.role}.bias"][rows.tokens] if rows.bias is not None else None
        kept.append(rows.without(own_rows(rows, weight, bias)))
    return replace(adapter, replaced=tuple(rows for rows in kept if len(rows.tokens)))


def with_own_copies(adapter: Adapter, model: OpenModel) -> Adapter:
    """Raises CheckpointError where a copy is not the model's own."""
    wanted = {key: tensor for tensor, key in adapter.copies}
    for piece in own_tensors(model, wanted):
        stored = wanted[piece.layer, piece.role]
        ((_, copy),) = read_tensors([stored])
        if not same(copy, piece.tensor):
            raise CheckpointError(
                f"{stored.file}: adapter {adapter.name!r} has a tensor {stored.name} that is not the model's own: "
                f"it was trained whole, or for another model; {MERGE}"
            )
    return adapter


def same(copy: Tensor, own: Tensor) -> bool:
    """Whether both are equal in the less precise of their dtypes."""
    dtype = min((copy.dtype, own.dtype), key=lambda dtype: dtype.itemsize)
    return torch.equal(copy.to(dtype), own.to(dtype))


def with_request(
    adapters: AdapterSet, request: LoRARequest | None, model: OpenModel, may_load: bool
) -> tuple[int, AdapterSet]:
    """The number of a request's adapter, 0 for none, and the adapters with it. may_load: one that is not known is read.
    Raises ConfigurationError, CheckpointError."""
    if request is None:
        return adapters.id_of(None), adapters
    found = adapters.find(request.name)
    if found is None and request.path:
        if adapters.merged is not None:
            raise ConfigurationError(
                f"lora_request: adapter {adapters.merged.name!r} is merged into the weights, and {request.name!r} "
                "would be added to it; leave lora_default out"
            )
        if not may_load:
            raise ConfigurationError(
                f"lora_request: adapter {request.name!r} is not loaded, and requests are waiting or running; name it "
                "with lora= when the engine is made, or add the request when nothing runs"
            )
        adapters = adapters.adding(checked(request, model))
    elif found is not None and request.path and found.folder.resolve() != Path(request.path).expanduser().resolve():
        raise ConfigurationError(
            f"lora_request: the name {request.name!r} belongs to the adapter in {found.folder}; give the one in "
            f"{request.path} another name"
        )
    return adapters.id_of(request.name), adapters
