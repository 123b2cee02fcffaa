"""A model by its name: what it is, and where its tensors come from. The one place that turns names into models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexbatch.config import EngineConfig
from flexbatch.models import checkpoint, resolve, shapes
from flexbatch.models.arch import Arch
from flexbatch.models.checkpoint import Piece
from flexbatch.models.described import Description
from flexbatch.models.dummy import dummy
from flexbatch.models.lora.adapter import Adapter
from flexbatch.models.lora.merge import merged
from flexbatch.models.quantized.config import Quantization, read_quantization
from flexbatch.models.quantized.decoding import planned_formats
from flexbatch.models.quantized.scheme import Form, QuantizedPiece
from flexbatch.validation.errors import CheckpointError, ConfigurationError


@dataclass(frozen=True)
class OpenModel:
    """A model folder (or GGUF file, as ``folder``), or a public shape with random weights (``folder`` is None). Nothing
    but its configuration is read before it is asked for."""

    name: str
    folder: Path | None
    arch: Arch
    tokenizer_name: str | None = field(default=None, kw_only=True)
    """Of a tokenizer that stands in for the model's own."""
    weight_bits: int = field(default=16, kw_only=True)
    """Codes of more bits than the user asks for are quantized anew."""
    adapter: Adapter | None = field(default=None, kw_only=True)
    """What is added to the weights as they are read."""

    quantization: Quantization | None = field(default=None, kw_only=True)
    """How the public shape's checkpoint is stored, where the weights are random."""

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; None for random weights. Raises CheckpointError."""
        if self.tokenizer_name is not None:
            return resolve.load_tokenizer(resolve.tokenizer_folder(self.tokenizer_name))
        return None if self.folder is None else resolve.load_tokenizer(self.folder)

    @cached_property
    def formats(self) -> dict[str, Form]:
        """Forms by role of a checkpoint that is quantized already, as far as a store holds it."""
        if self.folder is not None:
            return checkpoint.prequantized(self.folder, self.arch)
        return {} if self.quantization is None else planned_formats(self.quantization, self.arch)

    @property
    def prequantized(self) -> dict[str, Form]:
        """`formats` that are kept."""
        return {role: form for role, form in self.formats.items() if form.bits <= self.weight_bits}

    def check(self) -> None:
        """Raises CheckpointError for a checkpoint that does not hold what its configuration says, as far as headers
        show it."""
        if self.folder is not None:
            checkpoint.check(self.folder, self.arch)

    def pieces(
        self, skip: set[tuple[int, str]], seed: int, dtype: torch.dtype, packed: bool = False
    ) -> Iterator[Piece | QuantizedPiece]:
        """The tensors one by one, without the (layer, role) pairs in ``skip``: the checkpoint's, ``packed`` ones as
        they are stored, or random ones, with the adapter added. Raises CheckpointError."""
        pieces = self._own_pieces(skip, seed, dtype, packed)
        return pieces if self.adapter is None else merged(pieces, self.adapter, dtype)

    def _own_pieces(
        self, skip: set[tuple[int, str]], seed: int, dtype: torch.dtype, packed: bool
    ) -> Iterator[Piece | QuantizedPiece]:
        if self.folder is not None:
            if packed:
                yield from checkpoint.stream(self.folder, self.arch, skip, packed=True)
            else:
                yield from checkpoint.stream(self.folder, self.arch, skip)
            return
        for piece in dummy(self.arch, seed, dtype, self.prequantized if packed else {}):
            if (piece.layer, piece.role) not in skip:
                yield piece


@dataclass(frozen=True)
class PlannedModel(OpenModel):
    """A model of which config.json alone is known: to plan for, not to run."""

    described: Description = field(kw_only=True)

    @cached_property
    def tokenizer(self) -> Any:
        return None

    @cached_property
    def formats(self) -> dict[str, Form]:
        """By the weights' headers where they are there; else every matrix of a layer is taken to be quantized."""
        if self.described.folder is not None:
            with contextlib.suppress(CheckpointError):
                return checkpoint.prequantized(self.described.folder, self.arch)
        quantization = read_quantization(self.described.config)
        return {} if quantization is None else planned_formats(quantization, self.arch)


def planned_model(described: Description) -> PlannedModel:
    return PlannedModel(described.name, None, described.arch, described=described)


def open_model(name: str, dummy_weights: bool = False) -> OpenModel:
    """By "demo" or "demo-draft" (bundled), a local folder or GGUF file, or a Hub id, which is downloaded; with
    ``dummy_weights`` by the name of a public shape. Raises CheckpointError that says what is wrong."""
    if dummy_weights:
        return OpenModel(name, None, shapes.shape(name), quantization=read_quantization(shapes.config_of(name)))
    folder = resolve.resolve(name)
    return OpenModel(name, folder, checkpoint.read_arch(folder))


def open_configured(config: EngineConfig) -> OpenModel:
    """The model of the settings; see `as_configured`. Raises CheckpointError."""
    return as_configured(open_model(config.model, config.dummy_weights), config)


def as_configured(model: OpenModel, config: EngineConfig) -> OpenModel:
    """A model with the tokenizer and the bits of the settings, and their limit of its context. Raises
    ConfigurationError for a limit beyond the model's own context."""
    arch, limit = model.arch, config.max_model_len
    if limit is not None and limit > arch.max_positions:
        raise ConfigurationError(
            f"max_model_len={limit} must be at most {arch.max_positions}, the context of {config.model}"
        )
    wanted = limit, config.tokenizer, config.weight_bits
    if (arch.context_limit, model.tokenizer_name, model.weight_bits) == wanted:
        return model
    return replace(
        model,
        arch=replace(arch, context_limit=limit),
        tokenizer_name=config.tokenizer,
        weight_bits=config.weight_bits,
    )
