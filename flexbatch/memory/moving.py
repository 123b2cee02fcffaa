"""Weights that change their tiers while the engine lives: copied from where they lie, a layer at a time.

Error diffusion gives every layer nearly the same share of every tier, so that while layers move one after another a
tier never holds more than the larger of its shares before and after, but for a tensor or two: what a move needs besides
is one layer in host memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexbatch.memory.files import align, chunks
from flexbatch.memory.weight_plan import PlacedTensor, WeightPlan
from flexbatch.memory.weight_tensors import Key
from flexbatch.memory.weights import WeightStore


def move_weights(store: WeightStore, plan: WeightPlan) -> int:
    """Bring the weights of ``store`` to the tiers of ``plan``, with the bits that they have; returns the bytes that
    changed their tier. No runner may be open.

    What comes to the disk tier is a file without a name: nothing of it is left when the engine is closed. Where this
    raises, the store cannot be used any more. Raises OffloadError, DoesNotFitError.
    """
    store.close_buffers()
    before = store.plan
    moved = sum(
        tensor.num_bytes
        for tensor, was in zip(plan.all_tensors, before.all_tensors, strict=True)
        if tensor.tier != was.tier
    )
    for layer in before.groups:
        if before.groups[layer] == plan.groups[layer]:
            continue
        contents = {key_of(tensor): read_tensor(store, tensor) for tensor in before.groups[layer]}
        for tensor in before.groups[layer]:
            store.tensors.drop_file(key_of(tensor))
        store.tensors.free_layer(layer, before)
        store.tensors.allocate_layer(layer, plan)
        for tensor in plan.groups[layer]:
            write_tensor(store, tensor, contents.pop(key_of(tensor)))
    store.plan = store.tensors.plan = plan
    store.open_buffers()
    store.check()
    return moved


def most_while_moving(before: WeightPlan, after: WeightPlan) -> dict[str, int]:
    """The most bytes of weights that the gpu and the cpu tier hold during a move."""
    most = {}
    for tier in ("gpu", "cpu"):
        held = most[tier] = before.tier_bytes(tier)
        for layer in before.groups:
            held += after.group_bytes(layer, tier) - before.group_bytes(layer, tier)
            most[tier] = max(most[tier], held)
    return most


def key_of(tensor: PlacedTensor) -> Key:
    return tensor.spec.layer, tensor.spec.role


def read_tensor(store: WeightStore, tensor: PlacedTensor) -> Tensor:
    """A copy of a tensor's bytes in host memory, as long as its file would be."""
    buffer = torch.zeros(align(tensor.num_bytes), dtype=torch.uint8)
    if tensor.tier != "disk":
        buffer[: tensor.num_bytes].copy_(store.tensors.raw[key_of(tensor)])
        return buffer
    file = store.files[key_of(tensor)]
    list(store.queues.disk_chunks.map(lambda part: file.read(buffer[part[0] : part[1]], part[0]), chunks(len(buffer))))
    return buffer


def write_tensor(store: WeightStore, tensor: PlacedTensor, buffer: Tensor) -> None:
    if tensor.tier != "disk":
        store.tensors.raw[key_of(tensor)].copy_(buffer[: tensor.num_bytes])
        return
    file = store.tensors.make_file(key_of(tensor), len(buffer))
    list(store.queues.disk_chunks.map(lambda part: file.write(buffer[part[0] : part[1]], part[0]), chunks(len(buffer))))
