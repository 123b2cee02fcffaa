"""Weights that change their tiers while the engine lives: copied from where they lie, a layer at a time.

Error diffusion gives every layer nearly the same share of every tier, so that while layers move one after another a
tier never holds more than the larger of its shares before and after, but for a tensor or two: what a move needs besides
is one layer in host memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexbatch.memory.files import align, chunks, map_all
from flexbatch.memory.weight_plan import PlacedTensor, WeightPlan
from flexbatch.memory.weight_tensors import Key
from flexbatch.memory.weights import WeightStore


def no_tensor(key: Key) -> Tensor:
    """Nothing is new."""
    raise AssertionError(f"{key} is in no store")


def move_weights(store: WeightStore, plan: WeightPlan, new_tensor: Callable[[Key], Tensor] = no_tensor) -> int:
    """Bring the weights of ``store`` to the tiers of ``plan``, with the bits that they have; returns the bytes that
    changed their tier. No runner may be open. ``new_tensor``: what ``store`` has not, or not in this shape: adapters.

    What comes to the disk tier is a file without a name: nothing of it is left when the engine is closed. Where this
    raises, the store cannot be used any more. Raises OffloadError, DoesNotFitError.
    """
    store.close_buffers()
    before = store.plan
    tiers = {tensor.spec: tensor.tier for tensor in before.all_tensors}
    moved = sum(each.num_bytes for each in plan.all_tensors if tiers.get(each.spec) not in (None, each.tier))
    kept = {tensor.spec for tensor in plan.all_tensors} & tiers.keys()
    for layer in before.groups:
        if before.groups[layer] == plan.groups[layer]:
            continue
        contents = {
            key_of(tensor): read_tensor(store, tensor) for tensor in before.groups[layer] if tensor.spec in kept
        }
        for tensor in before.groups[layer]:
            store.tensors.drop_file(key_of(tensor))
        store.tensors.free_layer(layer, before)
        store.tensors.allocate_layer(layer, plan)
        for tensor in plan.groups[layer]:
            content = contents.pop(key_of(tensor), None)
            write_tensor(store, tensor, padded(new_tensor(key_of(tensor))) if content is None else content)
    store.plan = store.tensors.plan = plan
    store.open_buffers()
    store.check()
    return moved


def padded(tensor: Tensor) -> Tensor:
    """A tensor's bytes, as long as its file would be."""
    buffer = torch.zeros(align(tensor.nbytes), dtype=torch.uint8)
    buffer[: tensor.nbytes].copy_(tensor.view(torch.uint8).view(-1))
    return buffer


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
    map_all(store.queues.disk_chunks, lambda part: file.read(buffer[part[0] : part[1]], part[0]), chunks(len(buffer)))
    return buffer


def write_tensor(store: WeightStore, tensor: PlacedTensor, buffer: Tensor) -> None:
    if tensor.tier != "disk":
        store.tensors.raw[key_of(tensor)].copy_(buffer[: tensor.num_bytes])
        return
    file = store.tensors.make_file(key_of(tensor), len(buffer))
    map_all(store.queues.disk_chunks, lambda part: file.write(buffer[part[0] : part[1]], part[0]), chunks(len(buffer)))
