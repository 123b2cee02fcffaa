"""Measured hardware: rates in bytes or FLOPs a second, fixed costs in seconds, capacities in bytes, and their JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from flexbatch.policy.card_names import SHIPPED, shipped_name, shipped_names
from flexbatch.policy.curve import Curve, is_rate
from flexbatch.policy.launches import COUNTED, CPU_COUNTED, KERNELS_OF_TICK
from flexbatch.policy.suggest import did_you_mean


@dataclass(frozen=True)
class Hardware:
    """One machine as `profile` measured it: whatever limits a pass is a rate or a fixed cost here.

    On a "cpu" device the ``gpu`` tier is plain memory with a budget, and copies take cores away from compute.
    """

    name: str
    device: str
    """"cuda" or "cpu"."""
    gpu_memory_bytes: int
    cpu_memory_bytes: int
    disk_bytes: int
    h2d: float
    """Copy engine, pinned memory, alone."""
    d2h: float
    link_both: float
    """Sum of both directions when both are busy."""
    gather: float
    """Page gather by kernel, host pages to GPU staging."""
    scatter: float
    disk_read: float
    disk_write: float
    gemm: Curve
    """FLOP/s against tokens, not falling."""
    gpu_bandwidth: float
    """GPU memory, bytes read or written."""
    attention_decode: float
    """Bytes of cache a second that attention reads for single query tokens."""
    attention_prefill: float
    """FLOP/s of attention for prompt chunks, beside ``prompt_start_seconds``."""
    expand: float
    """Expansion of quantized weights: bytes read plus written a second."""
    cpu_attention: Curve
    """Bytes of 16-bit cache a second, link idle, against query tokens x query heads per key-value head."""
    cpu_attention_during_h2d: float
    """The first value of ``cpu_attention`` while the link is busy."""
    h2d_during_cpu_attention: float
    host_bandwidth: float
    """Host memory, bytes read or written, all users together."""
    launch_seconds: float
    """Per tick: what the host needs to launch a tick and no resource hides."""
    graph_seconds: float = 0.0
    """Per layer of a pass on a GPU, and micro-batch: what its kernels take beside bytes and products at the rates of
    large ones, as they begin and end one after another."""
    piece_seconds: float = 0.0
    """Per layer of another pass that lies on the GPU whole and runs in pieces: a graph and attention are launched.
    0: not measured, and taken for ``launch_seconds``."""
    coded_seconds: float = 0.0
    """Per tick of a few tokens that are multiplied with quantized weights as they are stored: what launching that takes
    longer than plain products. Of this and the other three that offloading and codes add, 0: by their kernels."""
    expand_seconds: float = 0.0
    """Per layer of quantized weights: the expansion of its matrices is launched, once for all micro-batches."""
    expand_start_seconds: float = 2e-5
    """Per layer of quantized weights, beside what its bytes take at the rate of one large matrix: kernels begin and run
    out one after another (graphs of OPT-1.3B, 4 bits, on an H100: 0.014 to 0.027 ms a layer)."""
    request_seconds: float = 0.0
    """Per sequence, once: it is admitted, gets its pages, and gives them back at its end."""
    prompt_token_seconds: float = 0.0
    """Per token of a prompt: it is looked for among shared pages, sent, and counted. 0: by its share in a pass."""
    staging_seconds: float = 0.0
    """Per tick that attends cache from another tier on the GPU: gathering, appending and draining are launched. 0: by
    their kernels."""
    fetch_seconds: float = 0.0
    """Per tick while weights stream: a slice of the next layer is put on the link, likewise. 0: by its kernels."""
    pass_seconds: float = 0.0
    """Per pass: composing it, sampling, committing."""
    sequence_seconds: float = 0.0
    """Per pass and sequence: its share of composing, sampling and committing, and of taking a page now and then."""
    away_sequence_seconds: float = 0.0
    """The same besides, of a sequence whose cache is not on the GPU: those that are there are kept in arrays."""
    cpu_attention_seconds: float = 0.0
    """Fixed cost of one call of CPU attention, per layer and micro-batch: its threads start and meet."""
    exchange_seconds: float = 0.0
    """Per tick of a single micro-batch that waits for CPU attention, which nothing hides: queries down, results up."""
    synchronize_seconds: float = 0.0
    """Per tick without overlap: waiting until nothing is under way, twice."""
    disk_read_seconds: float = 0.0
    """Fixed cost of one disk request."""
    link_seconds: float = 0.0
    """Fixed cost of one copy, per layer and micro-batch."""
    attention_tile_keys: float = 0.0
    """Keys that attention on the GPU takes together: of a sequence's last tile half is empty, on average. 512
    sequences of OPT-1.3B took 8.1 ms a pass at any context of 135 to 190 tokens."""
    attention_expand: float = 0.0
    """Bytes a second, counted at 16 bits, of quantized cache that attention expands; 0: twice `attention_decode`."""
    prompt_start_seconds: float = 0.0
    """Of a launch of attention for prompts on the GPU: its first tiles load, its last ones run out."""
    prompt_expand_8: float = 0.0
    prompt_expand_4: float = 0.0
    """Bytes a second, counted at 16 bits, that tiles of prompts expand of a cache of 8 and 4 bits, beside their
    products; 0: as `quantized_attention` and `TILES_OVER_CODES` say."""
    prompt_expand_8_start_seconds: float = 0.0
    prompt_expand_4_start_seconds: float = 0.0
    """``prompt_start_seconds`` over codes."""
    cpu_attention_8: Curve | None = None
    """``cpu_attention`` of 8-bit cache, counted at 16 bits; None: as fast as 16 bits."""
    cpu_attention_4: Curve | None = None
    """The same for 4 bits."""
    interconnect: float = 0.0
    """Bytes a second that each GPU sends to another one while they add up numbers; 0: as fast as ``d2h``."""
    interconnect_seconds: float = 0.0
    """Fixed cost of adding up numbers of several GPUs once."""
    interconnect_send: float = 0.0
    """Bytes a second from one GPU to another one; 0: as fast as ``interconnect``."""
    links_together: Curve | None = None
    """Share of its link that each GPU has while so many are sent something by the host; None: all of it."""
    cpu_attention_together: Curve | None = None
    """Of its part of the host's CPU attention what each of so many processes has that attend at once, each with its
    part of the cores; None: all of it."""
    cpu_attention_together_during_h2d: Curve | None = None
    h2d_together_during_cpu_attention: Curve | None = None
    """The same, and what each link has of ``h2d_during_cpu_attention``, while all of their GPUs are sent something by
    the host: memory that one link and all cores do not fill, several links may."""
    interconnect_launch_seconds: float = 0.0
    """What the host needs to launch one sum of several GPUs."""
    tell_seconds: float = 0.0
    """Per pass of several ranks: rank 0 tells the others what it is. 0: not measured."""
    tensor_ranks: int = 1
    """GPUs that share every layer, of which this is one."""
    cpu_experts: Curve | None = None
    """Bytes of 16-bit weights a second that the CPU computes experts at, link idle, against the rows that each is
    given; None: not measured, and no plan leaves experts to it."""
    cpu_experts_8: Curve | None = None
    cpu_experts_4: Curve | None = None
    """The same for 8 and 4 bits, bytes as they are stored. MXFP4 is as fast as other 4 bits, within a tenth."""
    coded_8: Curve | None = None
    coded_4: Curve | None = None
    """FLOP/s of a processor with weights of 8 and 4 bits, against tokens, expansion included where there is any; None:
    they are expanded, and multiplied as those of 16 bits."""
    gpu_reserved_bytes: int = 0
    """Not for the pools: context, libraries' workspaces, fragmentation."""
    cpu_reserved_bytes: int = 0
    origin: str = "measured"
    """"measured" on the machine, or "derived" from figures that others have published."""
    fit_error: dict = field(default_factory=dict)
    """Relative root-mean-square error of each fit."""
    source: dict = field(default_factory=dict)
    """Where each number comes from, for the reader."""

    def __post_init__(self) -> None:
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f'hardware {self.name!r}: device {self.device!r} must be "cuda" or "cpu"')
        if self.origin not in ("measured", "derived"):
            raise ValueError(f'hardware {self.name!r}: origin {self.origin!r} must be "measured" or "derived"')
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type not in ("int", "float"):
                wanted = {"str": str, "dict": dict, "Curve": Curve, "Curve | None": Curve | None}[str(f.type)]
                if not isinstance(value, wanted):
                    raise ValueError(f"hardware {self.name!r}: {f.name}={value!r:.80} must be of type {f.type}")
                continue
            may_be_zero = f.type != "float" or f.default is not dataclasses.MISSING or f.name.endswith("_seconds")
            if not is_rate(value) and not (may_be_zero and value == 0 and not isinstance(value, bool)):
                raise ValueError(
                    f"hardware {self.name!r}: {f.name}={value!r:.80} must be a finite, "
                    f"{'not negative' if may_be_zero else 'positive'} number"
                )

    @property
    def quantized_attention(self) -> float:
        """`attention_expand`, or the stand-in where it was not measured."""
        return self.attention_expand or 2 * self.attention_decode

    def coded(self, weight_bits: int) -> Curve | None:
        """FLOP/s of products with quantized weights against tokens, where they are not expanded for a pass."""
        return {8: self.coded_8, 4: self.coded_4}.get(weight_bits)

    def gemm_seconds(
        self, elements: float, tokens: float | np.ndarray, element_bytes: int = 2, weight_bits: int = 16
    ) -> np.ndarray:
        """Time to multiply ``tokens`` rows with weights of ``elements``. Time, not rate, is interpolated, so that it
        never falls with tokens. One token costs a read of the weights; ``tokens`` may be an array."""
        curve = self.coded(weight_bits) or self.gemm
        points = np.asarray(curve.points)
        seconds = np.maximum.accumulate(2 * points / np.asarray(curve.values))
        first = min(element_bytes / self.gpu_bandwidth, seconds[0])
        if points[0] > 1:
            points, seconds = np.r_[1.0, points], np.r_[first, seconds]
        tokens = np.asarray(tokens, dtype=float)
        inside = np.interp(tokens, points, seconds)
        return elements * np.where(
            tokens <= 0, 0.0, np.where(tokens > points[-1], seconds[-1] * tokens / points[-1], inside)
        )

    def cpu_attention_rate(self, queries_per_kv_head: float, cache_bits: int = 16) -> float:
        """Bytes a second, counted at 16 bits, link idle; beyond the last measured point attention is bound by
        compute, and time grows with the queries."""
        curve = {8: self.cpu_attention_8, 4: self.cpu_attention_4}.get(cache_bits) or self.cpu_attention
        return curve.at(queries_per_kv_head) * min(1.0, curve.points[-1] / queries_per_kv_head)

    def cpu_expert_seconds(self, num_bytes: float, rows: np.ndarray, weight_bits: int = 16) -> np.ndarray:
        """Time of an expert of so many bytes that is given so many rows; beyond the last measured point it grows with
        the rows. Where nothing was measured, as long as attention takes to read as many bytes."""
        curve = {8: self.cpu_experts_8, 4: self.cpu_experts_4}.get(weight_bits, self.cpu_experts) or self.cpu_attention
        rates = np.interp(rows, curve.points, curve.values)
        return num_bytes / rates * np.maximum(1.0, np.asarray(rows) / curve.points[-1])

    def launched_seconds(self, what: str) -> float:
        """Per tick (of "expand", per layer): what the host takes to launch what a tick may have besides, one of
        `launches.COUNTED`, as it was measured, or by its share in the kernels of a tick."""
        measured: float = getattr(self, f"{what}_seconds", 0.0)
        counted = COUNTED if self.device == "cuda" else CPU_COUNTED
        return measured or self.launch_seconds * counted[what] / KERNELS_OF_TICK

    @property
    def cpu_attention_slowdown(self) -> float:
        """Bytes of CPU attention given up for each byte on the link."""
        return max(0.0, self.cpu_attention.values[0] - self.cpu_attention_during_h2d) / self.h2d_during_cpu_attention

    @property
    def link_slowdown(self) -> float:
        """Bytes on the link given up for each byte of CPU attention."""
        return max(0.0, self.h2d - self.h2d_during_cpu_attention) / self.cpu_attention_during_h2d

    def with_memory(self, gpu: int | None = None, cpu: int | None = None, disk: int | None = None) -> Hardware:
        """The same machine with other budgets."""
        return dataclasses.replace(
            self,
            gpu_memory_bytes=self.gpu_memory_bytes if gpu is None else int(gpu),
            cpu_memory_bytes=self.cpu_memory_bytes if cpu is None else int(cpu),
            disk_bytes=self.disk_bytes if disk is None else int(disk),
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """Raises ValueError that names what is missing, unknown or wrong, whatever the text is."""
        try:
            data = json.loads(text)
        except RecursionError as error:
            raise ValueError("hardware JSON: nested too deeply") from error
        if not isinstance(data, dict):
            raise ValueError(f"hardware JSON: an object is wanted, not a {type(data).__name__}")
        names = {f.name for f in fields(cls)}
        needed = {
            f.name for f in fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if unknown := data.keys() - names:
            raise ValueError(f"hardware JSON: unknown fields {sorted(unknown)}")
        if missing := needed - data.keys():
            raise ValueError(
                f"hardware JSON: missing fields {sorted(missing)}; measure the machine again with flexbatch profile"
            )
        for name in (f.name for f in fields(cls) if str(f.type).startswith("Curve")):
            curve = data.get(name)
            if curve is None:
                continue
            if not isinstance(curve, dict) or not all(
                isinstance(curve.get(part), list) for part in ("points", "values")
            ):
                raise ValueError(f"hardware JSON: {name} must be an object of points and values")
            try:
                data[name] = Curve(tuple(curve["points"]), tuple(curve["values"]))
            except ValueError as error:
                raise ValueError(f"hardware JSON: {name}: {error}") from error
        return cls(**data)


def read_hardware(path: Path) -> Hardware:
    """The machine of a file. Raises OSError, or ValueError that says what is wrong with it."""
    return Hardware.from_json(path.read_text(encoding="utf-8"))


def load_hardware(name_or_path: str | Path) -> Hardware:
    """A shipped machine by name ("rtx-4090", "RTX 4090", "cpu") or a JSON file. Raises FileNotFoundError that lists
    the shipped names."""
    name = str(name_or_path)
    shipped = shipped_name(name)
    path = Path(name).expanduser() if shipped is None else SHIPPED / f"{shipped}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no machine and no file {name!r}{did_you_mean(name, shipped_names()) or '.'} The machines shipped: "
            f"{', '.join(shipped_names())}; or give a JSON file of flexbatch profile"
        )
    return read_hardware(path)
