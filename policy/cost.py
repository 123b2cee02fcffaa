"""Closed-form time of a pass, per resource, and the bound.

Every demand is an affine function of the placement: a vector over ``VARIABLES`` with the constant first. The linear
program takes these vectors as rows and `pass_seconds` takes their maximum at a placement, so that the two cannot
disagree.

A pass is L layers and the head. While layer j computes, the weights of layer j + 1 cross the link, so a pass has
three kinds of stage: (computes a layer, fetches a layer) L - 1 times, (layer, head) once and (head, first layer of
the next pass) once; where some layers have experts and some have not, the first kind is two. A stage takes the
maximum over the resources. Launching its ticks, and what streamed weights and staged cache have the host launch
besides, runs beside that, and a part of the shorter of the two shows. Composing a pass comes before, in the open; where
all of it lies on one GPU, beside the pass before.
"""

from __future__ import annotations

import functools

import numpy as np

from flexbatch.policy.affine import COLUMNS, KINDS, RESIDENT, evaluate, slowest, total
from flexbatch.policy.beside import IN_VIEW, STREAMED_IN_VIEW, WAITING_IN_VIEW, together
from flexbatch.policy.collectives import head_launch_seconds, sum_seconds, sums_of_pass, telling_seconds
from flexbatch.policy.decode_graphs import LAUNCHES_OF_EXPERTS, recorded_sequences, runs_graphs
from flexbatch.policy.expansion import quantized_launch_seconds
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.host_work import prompt_token_seconds
from flexbatch.policy.launches import KERNELS_OF_TICK
from flexbatch.policy.limits import MAX_GRAPH_SEQUENCES
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.piece_graphs import piece_buckets, tokens_of
from flexbatch.policy.policy import Policy
from flexbatch.policy.recorded_load import RecordedLoad, apart
from flexbatch.policy.stage import Stage
from flexbatch.policy.stages import SERIAL, PassStages

RESOURCES = (
    *("h2d", "d2h", "disk_read", "disk_write", "gpu_compute", "gpu_memory"),
    *("cpu_attention", "cpu_experts", "host_memory"),
)
JOINT: dict[str, tuple[str, ...]] = {
    "h2d + d2h": ("h2d", "d2h"),
    "disk_read + disk_write": ("disk_read", "disk_write"),
    "h2d beside cpu_attention": ("h2d", "cpu_attention", "cpu_experts"),
    "cpu_attention beside h2d": ("cpu_attention", "cpu_experts", "h2d"),
    "cpu_attention + cpu_experts": ("cpu_attention", "cpu_experts"),
    "CPU attention in turn": ("cpu_attention", "cpu_experts", "gpu_compute"),
    "gather beside gpu_compute": ("h2d", "gpu_compute"),
    "h2d after dequantization": ("h2d", "gpu_compute"),
    "cpu_attention after dequantization": ("cpu_attention", "gpu_compute"),
    "between stages": (),
    "cores": ("gpu_compute", "cpu_attention", "cpu_experts", "h2d", "d2h"),
    "no overlap": SERIAL,
}
"""Rows where resources slow each other or take turns, and these resources."""
ROWS = RESOURCES + tuple(JOINT)


class PassModel:
    """Demands of the passes ``load`` of a model on a machine for a policy's sizes and bits.

    Of the policy's placement two things count: whether any sequence is attended on the CPU (``cpu_attention`` above 0)
    and any expert computed there (``cpu_experts``), which have fixed costs, however few they are. graphs: whether there
    is memory for decode graphs where everything is on the GPU. hits: as of `PassStages`.
    """

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        policy: Policy,
        load: PassLoad,
        graphs: bool = True,
        hits: bool = True,
    ) -> None:
        self.shape, self.hardware, self.policy, self.load, self.hits = shape, hardware, policy, load, hits
        self.graphs = graphs and runs_graphs(policy, hardware.device, hardware.tensor_ranks, shape.stages)
        self.batches = policy.num_gpu_batches

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """Where passes are no graphs."""
        return PassStages(self.shape, self.hardware, self.policy, self.load, self.hits).stages()

    @functools.cached_property
    def recorded_stages(self) -> list[Stage]:
        """Where everything is on the GPU: graphs are recorded for numbers of tokens, and compute what fills them up."""
        if not self.graphs:
            return self.stages
        buckets = piece_buckets(self.policy, self.hardware.tensor_ranks)
        pieced = np.where(self.in_pieces, tokens_of(buckets, self.tokens), self.tokens)
        sequences = recorded_sequences(np.asarray(self.load.decode_sequences), self.in_graphs)
        recorded = RecordedLoad(
            tokens=np.where(self.in_graphs, sequences, pieced),
            attended=np.where(self.in_graphs, sequences, self.load.decode_sequences),
            pieces=self.in_pieces,
        )
        return PassStages(self.shape, self.hardware, self.policy, self.load, self.hits, recorded).stages()

    def stages_at(self, point: np.ndarray) -> list[Stage]:
        return self.recorded_stages if self.on_gpu(point) else self.stages

    @property
    def tokens(self) -> np.ndarray:
        """Query tokens of each pass."""
        return self.load.tokens

    @property
    def host_seconds(self) -> np.ndarray:
        """Composing a pass, telling other ranks of it, sampling, committing; and what a sequence costs once, in the
        pass that completes its prompt, and for each token of that."""
        hardware, finished = self.hardware, np.asarray(self.load.finished_prompts)
        each = hardware.sequence_seconds * (self.load.decode_sequences + finished)
        read = prompt_token_seconds(hardware) * np.asarray(self.load.prompt_tokens)
        once = hardware.pass_seconds + telling_seconds(self.shape, hardware)
        return once + each + hardware.request_seconds * finished + read

    def composed(self, point: np.ndarray) -> np.ndarray:
        """What the host does once in each pass at a placement, which nothing hides unless it `goes_ahead`. Of pieces
        the first is launched while the GPU has nothing to do, unless the pass before still runs."""
        away = np.asarray(self.load.decode_sequences) * (1 - point[COLUMNS["cache_gpu"]])
        alone = self.on_gpu(point) and not self.may_go_ahead
        first = self.in_pieces * self.hardware.piece_seconds if alone else 0.0
        return self.host_seconds + away * self.hardware.away_sequence_seconds + first

    @property
    def tick_seconds(self) -> np.ndarray:
        """Launching every tick of one pass, those of experts with what routes, its sums between GPUs, and of quantized
        weights once a layer the expansion, or with every tick products with their codes."""
        layers, hardware = self.shape.num_layers, self.hardware
        one_sum = hardware.interconnect_launch_seconds + hardware.launched_seconds("sum")
        sums = sums_of_pass(self.shape, hardware, self.batches) * one_sum
        routed = layers - self.shape.dense_layers if self.shape.experts else 0
        ticks = (layers + 1 + routed * LAUNCHES_OF_EXPERTS / KERNELS_OF_TICK) * self.batches
        plain = ticks * hardware.launch_seconds + sums
        return np.asarray(plain + layers * quantized_launch_seconds(hardware, self.policy, self.tokens))

    @property
    def launch_seconds(self) -> np.ndarray:
        """Seconds of one pass: launching every tick, and what happens once a pass and for every sequence."""
        return self.tick_seconds + self.host_seconds

    @property
    def collective_seconds(self) -> np.ndarray:
        """Of one pass: what GPUs that share its layers take to add up, a part of what they compute."""
        if self.hardware.tensor_ranks == 1:
            return 0.0 * self.tokens
        return self.shape.num_layers * sum_seconds(self.hardware, self.tokens, self.shape.hidden_bytes, self.batches)

    def on_gpu(self, point: np.ndarray) -> bool:
        """Whether everything is on a GPU at a placement."""
        return self.hardware.device == "cuda" and all(point[COLUMNS[f"{kind}_gpu"]] >= 1 - RESIDENT for kind in KINDS)

    @property
    def in_graphs(self) -> np.ndarray:
        """Which passes are one graph each, where everything is on the GPU: without prompts, and not too many
        sequences."""
        few = np.asarray(self.load.decode_sequences) <= MAX_GRAPH_SEQUENCES
        return self.graphs & (np.asarray(self.load.prompt_tokens) == 0) & few

    @property
    def in_pieces(self) -> np.ndarray:
        """Which passes run in pieces, where everything is on the GPU and they are not one graph each."""
        buckets = piece_buckets(self.policy, self.hardware.tensor_ranks)
        few = self.tokens <= max(buckets, default=0)
        return self.graphs & (self.hardware.piece_seconds > 0) & few & ~self.in_graphs

    def apart_launch_seconds(self, share: float) -> np.ndarray:
        """Per tick, where so large a share of the cache is on the GPU: attention for prompts is launched by itself."""
        decoding = np.asarray(self.load.decode_sequences) * share
        return apart(decoding, np.asarray(self.load.prompt_tokens), self.batches) * self.hardware.launched_seconds(
            "apart"
        )

    @property
    def piece_launch_seconds(self) -> np.ndarray:
        """Of a pass in pieces."""
        layers = self.shape.num_layers
        return (layers + 1) * self.hardware.piece_seconds + layers * self.apart_launch_seconds(1.0)

    def launched(self, point: np.ndarray) -> np.ndarray:
        """Seconds of launching in each pass at a placement, composing it included, whatever hides it."""
        return self.composed(point) + self._ticks(point)

    @property
    def may_go_ahead(self) -> bool:
        """Whether there are placements at which it `goes_ahead`."""
        alone = self.hardware.tensor_ranks == 1 and self.shape.stages == 1
        return self.hardware.device == "cuda" and alone and self.policy.overlap and self.policy.async_scheduling

    def goes_ahead(self, point: np.ndarray) -> bool:
        """Whether at a placement a pass is composed and launched while the one before runs."""
        return self.may_go_ahead and self.on_gpu(point)

    def _ticks(self, point: np.ndarray) -> np.ndarray:
        """Seconds of launching the ticks of each pass at a placement."""
        if self.on_gpu(point):
            plain = self.tick_seconds + self.shape.num_layers * self.batches * self.apart_launch_seconds(1.0)
            other = np.where(self.in_pieces, self.piece_launch_seconds, plain)
            head = head_launch_seconds(self.shape, self.hardware, np.asarray(self.load.decode_sequences))
            return np.where(self.in_graphs, head, other)  # the layers by the GPU
        each = np.asarray(self._extra_launch_seconds(point))
        return self.tick_seconds + self.shape.num_layers * self.batches * each

    def in_view(self, point: np.ndarray) -> np.ndarray:
        """The share of the shorter of launching and of what is launched that the longer one does not hide: all of it
        where nothing overlaps, and nothing of pieces behind the first."""
        if self.hardware.device != "cuda" or not self.policy.overlap:
            return np.asarray(1.0)
        if self.on_gpu(point):
            return np.where(self.in_pieces, 0.0, STREAMED_IN_VIEW if self.may_go_ahead else IN_VIEW)
        waits = ("cpu_attention", "cpu_experts", "weights_disk", "cache_disk")
        if any(point[COLUMNS[name]] > RESIDENT for name in waits):
            return np.asarray(WAITING_IN_VIEW)
        return np.asarray(STREAMED_IN_VIEW)

    @property
    def least_in_view(self) -> float:
        """At any placement."""
        if np.any(self.in_pieces):
            return 0.0
        return STREAMED_IN_VIEW if self.hardware.device == "cuda" and self.policy.overlap else 1.0

    def _extra_launch_seconds(self, point: np.ndarray) -> np.ndarray:
        """Per tick: what a placement with streamed weights, hidden states that leave the GPU, or cache that is attended
        from staging or by the CPU, has the host launch besides; where a part of the cache is on the GPU, attention a
        second time. One micro-batch alone waits for the CPU, and a row of its own has what that takes."""
        weights_gpu, cache_gpu, activations_gpu, cpu_attention = (
            point[COLUMNS[name]] for name in ("weights_gpu", "cache_gpu", "activations_gpu", "cpu_attention")
        )
        staged = 1 - cache_gpu > RESIDENT and (
            (np.asarray(self.load.prompt_tokens) > 0)
            | ((np.asarray(self.load.decode_sequences) > 0) & (1 - cache_gpu - cpu_attention > RESIDENT))
        )
        calls = 2 if cache_gpu > RESIDENT else 1
        seconds = self.hardware.launched_seconds
        moved = (("fetch", weights_gpu), ("activations", activations_gpu))
        away = sum(seconds(what) for what, on_gpu in moved if 1 - on_gpu > RESIDENT)
        sent = cpu_attention > RESIDENT and self.batches > 1 and self.policy.overlap
        attended = sent * (np.asarray(self.load.decode_sequences) > 0) * seconds("attended")
        near = self.apart_launch_seconds(cache_gpu) if cache_gpu > RESIDENT else 0.0
        return np.where(staged, calls * seconds("staging"), 0.0) + away + attended + near

    def busy_seconds(self, point: np.ndarray) -> np.ndarray:
        """Of each pass at a placement, the slowest row of every stage."""
        return total(s.count * slowest(s.seconds.values(), point) for s in self.stages_at(point))

    def pass_seconds(self, point: np.ndarray) -> np.ndarray:
        """Predicted time of each pass at a placement."""
        composed, busy, in_view = self.composed(point), self.busy_seconds(point), self.in_view(point)
        if self.goes_ahead(point):
            return together(composed + self._ticks(point), busy, in_view)
        return composed + together(self._ticks(point), busy, in_view)

    def launching_seconds(self, point: np.ndarray) -> np.ndarray:
        """Of each pass at a placement, what no resource is busy for."""
        return self.pass_seconds(point) - self.busy_seconds(point)

    def resource_seconds(self, point: np.ndarray) -> dict[str, np.ndarray]:
        """Time that each row needs in one pass, were it alone."""
        stages = self.stages_at(point)
        return {name: total(s.count * evaluate(s.seconds[name], point) for s in stages) for name in stages[0].seconds}

    def resource_work(self, point: np.ndarray) -> dict[str, np.ndarray]:
        """Bytes (FLOPs for gpu_compute) of each resource in one pass."""
        stages = self.stages_at(point)
        return {name: total(s.count * evaluate(s.work[name], point) for s in stages) for name in RESOURCES}

    @property
    def ceilings(self) -> dict[str, float]:
        """What the machine was measured at, each resource alone: bytes a second, FLOP/s of gpu_compute, bytes of
        rows as they are stored of cpu_attention."""
        hardware, shape = self.hardware, self.shape
        attention = hardware.cpu_attention_rate(shape.num_heads / shape.num_kv_heads, self.policy.cache_bits)
        rates = {name: getattr(hardware, name) for name in ("h2d", "d2h", "disk_read", "disk_write")}
        return {
            **rates,
            "gpu_compute": max(hardware.gemm.values),
            "cpu_experts": self._expert_rate,
            "cpu_attention": attention * shape.token_bytes(self.policy.cache_bits) / shape.token_bytes(16),
        }

    @property
    def _expert_rate(self) -> float:
        """Bytes a second of experts that are given one row."""
        return 1.0 / float(self.hardware.cpu_expert_seconds(1.0, np.asarray(1.0), self.policy.weight_bits))

    def bound_seconds(self, point: np.ndarray) -> np.ndarray:
        """The least time of a pass at a placement: the busiest row, everything else hidden, nothing launched."""
        return functools.reduce(np.maximum, self.resource_seconds(point).values())
