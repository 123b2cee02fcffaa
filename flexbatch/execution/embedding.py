"""The hidden states that the first layer is given: rows of the embedding table, gathered where it lies."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.memory.weight_tensors import WeightTensors
from flexbatch.models import layers
from flexbatch.models.arch import Arch
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
        inputs.adapters.add(-1, "embed", weights, inputs.token_ids, rows)
    return layers.embed(arch, weights, rows, position_rows, inputs.adapters)
