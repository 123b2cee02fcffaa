"""Which layers' weights are put on the link beside a tick: of the next one a slice, and before the host waits, all that
there are working slabs for."""

from __future__ import annotations

from flexbatch.memory.handles import READY, Handle
from flexbatch.memory.weights import WeightStore
from flexbatch.policy.schedule import Tick


class LayersAhead:
    """Fetches layers in the order of their use. ``whole``: whether all layers of the model and the head are here, so
    that a pass begins again where it ends."""

    def __init__(self, weights: WeightStore, overlap: bool, whole: bool) -> None:
        self.weights = weights
        self.num_layers = weights.plan.arch.num_layers + whole
        """With the head."""
        self.goes_further = overlap and whole and self.num_layers > 2

    def before_deferred(self, tick: Tick) -> None:
        """While the second half of the tick before is put off: with a third slab the link need not wait for it."""
        if tick.fetch_weights is not None and self.weights.can_fetch(tick.fetch_weights[0]):
            self.weights.fetch(*tick.fetch_weights)

    def before_waiting(self, tick: Tick, count: int, pages: Handle) -> None:
        """What the link needs until the host, which is about to wait for the CPU's share, has waited. With one slice a
        tick both links idled by turns (OPT-30B, 92 sequences on the CPU: 1.26 s a pass where the link needs 1.0).

        What comes behind the next layer waits for the ``pages`` of the next tick, which are needed sooner.
        """
        if tick.fetch_weights is not None:
            self.weights.fetch_rest(tick.fetch_weights[0], count)
            self._further(tick.layer, tick.micro_batch + 1, count, pages)

    def at_end(self, count: int) -> None:
        """Behind the last tick of a pass: only the head's slab was missing for more than the first layer of the next
        pass."""
        self._further(self.num_layers - 1, count, count, READY)

    def _further(self, layer: int, slices: int, count: int, after: Handle) -> None:
        """So many of ``count`` slices of the layers behind the one that follows ``layer``, where slabs are free.

        Layers that see a window and layers that see everything take unlike times: those of gpt-oss-120b 13 and 51 ms
        of CPU attention on an H200's host, and 30 and 48 ms of the link. With one layer ahead the link waits in the
        latter and the CPU in the former: a pass took 1.69 s, of which the link was busy for 84 %.
        """
        for ahead in range(2, len(self.weights.slabs) + 1) if self.goes_further else ():
            following = (layer + ahead) % self.num_layers
            if not self.weights.can_fetch(following):
                return
            for index in range(slices):
                self.weights.fetch(following, index, count, after)
