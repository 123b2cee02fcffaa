"""The hidden states that the first layer is given: rows of the embedding table, gathered where it lies."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.memory.weight_tensors import WeightTensors
from flexbatch.models import layers
from flexbatch.models.arch import Arch
from flexbatch.models.lora.applied import PassAdapters
from flexbatch.parallel.tensor_ranks import TensorRanks


def embed(arch: Arch, tensors: WeightTensors, inputs: MicroBatchInputs, ranks: TensorRanks | None) -> Tensor:
    """[T, H] of the tokens of a micro-batch. ranks: that have the rest of the table."""
    gather, ids = partial(tensors.gather_rows, "embed.weight"), (inputs.token_ids, inputs.host_token_ids)
    rows, position_rows = gather(*ids) if ranks is None else ranks.look_up(gather, *ids), None
    if arch.position == "learned":
        offset = arch.position_offset
        position_rows = tensors.gather_rows(
            "pos_embed.weight", inputs.positions + offset, inputs.host_positions + offset
        )
    weights = tensors.embedding_weights
    if inputs.adapters is not None:
        rows = _replaced(tensors, inputs, inputs.adapters, rows)
        inputs.adapters.add(-1, "embed", weights, inputs.token_ids, rows)
    return layers.embed(arch, weights, rows, position_rows, inputs.adapters)


def _replaced(tensors: WeightTensors, inputs: MicroBatchInputs, adapters: PassAdapters, rows: Tensor) -> Tensor:
    """The rows with those that the tokens' adapters have instead. On the host the newest tokens may be unread, where
    nothing is looked up by it."""
    own = adapters.tables.embedding_rows
    if own is None:
        return rows
    slots = own.slots[adapters.numbers, inputs.token_ids]
    numbers = torch.from_numpy(inputs.adapter_ids).long()
    # A graph's inputs have no tokens on the host, and its table is on the device.
    ids = inputs.host_token_ids.clamp(min=0)
    host_slots = own.host_slots[numbers, ids] if len(ids) == len(numbers) else own.host_slots[:0, 0]
    found = tensors.gather_rows(own.role, slots.clamp(min=0).long(), host_slots.clamp(min=0).long())
    return torch.where((slots >= 0)[:, None], found, rows)
