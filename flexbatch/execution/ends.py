"""Where the hidden states of a pass come from and where they go: the embedding and the head, or other stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from flexbatch.execution.embedding import embed
from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.memory.activations import ActivationStore
from flexbatch.memory.weight_tensors import WeightTensors
from flexbatch.models.arch import Arch
from flexbatch.parallel.rank_links import RankLinks
from flexbatch.trace import Tracer


class Ends:
    """Both ends of the layers that are here."""

    def __init__(
        self,
        arch: Arch,
        tensors: WeightTensors,
        activations: ActivationStore,
        links: RankLinks | None,
        tracer: Tracer,
    ) -> None:
        self.arch, self.tensors, self.activations = arch, tensors, activations
        self.ranks, self.stages = (None, None) if links is None else (links.tensor, links.stages)
        if self.ranks is not None:
            self.ranks.tracer = tracer

    @property
    def takes_newest(self) -> bool:
        """Whether a pass may run whose newest tokens only the device knows: not where the host looks them up."""
        tables = {"embed.weight"} | {each.spec.role for each in self.tensors.plan.gathered} - {"pos_embed.weight"}
        return self.tensors.device.type == "cpu" or all(map(self.tensors.gathers_on_device, tables))

    def expect(self, layer: int, micro_batch: int, inputs: MicroBatchInputs) -> None:
        """Start to receive what a (layer, micro-batch) cell is given, where another stage has it."""
        if layer == 0 and self.stages is not None and not self.stages.is_first:
            self.stages.expect(micro_batch, inputs.num_tokens)

    def given(self, layer: int, micro_batch: int, inputs: MicroBatchInputs) -> Tensor:
        """The hidden states that a layer is given."""
        if layer:
            return self.activations.get(micro_batch)
        if self.stages is not None and not self.stages.is_first:
            return self.stages.receive(micro_batch)
        return embed(self.arch, self.tensors, inputs, self.ranks)

    def take(self, layer: int, micro_batch: int, inputs: MicroBatchInputs, hidden: Tensor) -> None:
        """What a layer has made of them."""
        if layer < self.arch.num_layers - 1:
            self.activations.put(micro_batch, hidden)
            return
        if self.stages is None or self.stages.is_last:
            # Only the rows that the head reads go on.
            hidden = hidden.index_select(0, inputs.logit_index)
        if self.stages is None:
            self.activations.set(micro_batch, hidden)
        else:
            self.stages.send(micro_batch, hidden)

    def returned(self, inputs: Sequence[MicroBatchInputs]) -> Iterator[tuple[int, MicroBatchInputs]]:
        """The micro-batches of a pass whose rows for the head have come back to the first stage, one by one."""
        assert self.stages is not None
        for k, each in enumerate(inputs):
            self.stages.expect(k, len(each.logit_index))
        for k, each in enumerate(inputs):
            self.activations.set(k, self.stages.receive(k))
            yield k, each
