"""The cost model's ticks and bytes against those of the real executor, pass by pass, on a small model on the CPU.

On a CPU the "gpu" tier is plain memory, and some copies have no transfer queue there. Not compared for this reason:
the embedding rows that the head's stage gathers, the queries, keys, values and outputs of CPU attention, and the
hops between GPU and host of weights and cache whose tier is the disk (they are compared where the disk is read or
written).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.execution.executor import Executor
from flexbatch.memory.transfer import ThreadQueue
from flexbatch.planner.monitor import PassMeter
from flexbatch.planner.problem import model_shape
from flexbatch.policy.cost import PassModel
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.limits import PAGE_TOKENS, weight_group
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import PassLoad
from tests.tiny_models import make_model, random_prompts

GPU, CPU, DISK = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
HALVES = (0.0, 0.5, 0.5)
RAGGED, EQUAL = [20, 35, 7, 40], [40, 40, 40, 40]
"""Prompt lengths. No chunk of 16 leaves one token: the executor attends such a chunk on the CPU, the model on the
GPU."""
RESOURCES = ("h2d", "d2h", "disk_read", "disk_write", "cpu_attention")
TENSOR_ALIGNMENT = {"h2d": 256, "disk_read": 4096}
"""Bytes to which a tensor of the weights is padded, at most, in a slab and in a file."""


@dataclasses.dataclass
class Pass:
    """What the executor did in one pass: submitted bytes by (resource, kind of tensor), and ticks."""

    load: PassLoad
    moved: Counter[tuple[str, str]]
    ticks: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    make_model("llama", made)
    return made


def run(
    folder: Path, offload: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], settings: dict[str, Any]
) -> tuple[list[Pass], LLM]:
    """Passes of a job of four sequences in two micro-batches, prompts in chunks of 16 tokens."""
    moved: Counter[tuple[str, str]] = Counter()
    passes: list[Pass] = []
    counted, execute = ThreadQueue.counted, Executor.run

    def counting(self: ThreadQueue, job: Any, after: Any, name: str, num_bytes: int) -> Any:
        moved[self.resource, name.split(" ")[0]] += num_bytes
        return counted(self, job, after, name, num_bytes)

    def recording(self: Executor, work: Any, *rest: Any, **named: Any) -> Iterator[Any]:
        load, before, ticks = PassMeter.load(work), Counter(moved), count_ticks(self)
        yield from execute(self, work, *rest, **named)
        passes.append(Pass(load, moved - before, count_ticks(self) - ticks))

    monkeypatch.setattr(ThreadQueue, "counted", counting)
    monkeypatch.setattr(Executor, "run", recording)
    sizes = {"gpu_batch_size": 2, "num_gpu_batches": 2, "prefill_chunk": 16, "cpu_attention": 0.0}
    memory = {"gpu_memory": "256MiB", "cpu_memory": "256MiB", "offload_dir": str(offload)}
    with LLM(str(folder), device="cpu", hardware="cpu", trace=True, **{**sizes, **memory, **settings}) as llm:
        llm.generate(random_prompts(lengths), SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    return passes, llm


def count_ticks(executor: Executor) -> int:
    return sum(span.resource == "tick" for span in executor.tracer._spans)  # type: ignore[attr-defined]


def percent(weights: Any = GPU, cache: Any = GPU, activations: Any = GPU) -> tuple[float, ...]:
    return tuple(100 * share for split in (weights, cache, activations) for share in split[:2])


def predictor(llm: LLM, load: PassLoad) -> PassModel:
    """The cost model of a pass, launching of a tick at one second, and nothing else launched."""
    shape = model_shape("llama", llm.engine_plan.arch, 4, llm.policy.weight_bits)
    costs = {"launch_seconds": 1.0, "expand_seconds": 1e-99, "pass_seconds": 0.0, "sequence_seconds": 0.0}
    return PassModel(shape, dataclasses.replace(load_hardware("cpu"), **costs), llm.policy, load)


def work(model: PassModel, weights: Any = GPU, cache: Any = GPU, activations: Any = GPU) -> dict[str, float]:
    """Predicted bytes of a pass by resource at a placement."""
    attended = cache[1] * model.policy.cpu_attention
    found = model.resource_work(np.array([1.0, *weights, *cache, *activations, attended, 0.0]))
    return {name: float(found[name]) for name in RESOURCES}


CACHES = {
    "CPU": (CPU, 16, 0.0, RAGGED),
    "CPU, 8 bits": (CPU, 8, 0.0, RAGGED),
    "CPU, 4 bits": (CPU, 4, 0.0, RAGGED),
    "CPU attention": (CPU, 16, 1.0, RAGGED),
    "CPU attention, 4 bits": (CPU, 4, 1.0, RAGGED),
    "half CPU attention": (CPU, 16, 0.5, EQUAL),
    "disk": (DISK, 16, 0.0, RAGGED),
    "disk, 4 bits": (DISK, 4, 0.0, RAGGED),
    "CPU and disk": (HALVES, 16, 0.0, EQUAL),
    "CPU attention and disk": (HALVES, 8, 1.0, EQUAL),
}


@pytest.mark.parametrize("case", CACHES.values(), ids=CACHES.keys())
def test_cache_bytes_and_ticks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Any) -> None:
    cache, bits, attention, lengths = case
    settings = {"percent": percent(cache=cache), "cache_bits": bits, "cpu_attention": attention}
    passes, llm = run(folder, tmp_path, monkeypatch, lengths, settings)
    assert len(passes) >= 7
    for each in passes:
        model, load = predictor(llm, each.load), each.load
        shape, layers = model.shape, model.shape.num_layers
        # With prompts of several lengths a micro-batch may have nothing to do in a pass.
        assert lengths == RAGGED or each.ticks == float(model.launch_seconds)
        found, expected = {name: each.moved[name, "cache"] for name in RESOURCES}, work(model, cache=cache)
        row, attended = layers * shape.token_bytes(bits), cache[1] * attention
        exchanged = attended * load.decode_sequences * layers * shape.num_heads * shape.head_dim * 4
        # On a CPU: no queue for what CPU attention exchanges, nor for the link between disk and GPU.
        expected["h2d"] -= exchanged + expected["disk_read"]
        expected["d2h"] -= exchanged + expected["disk_write"] + attended * load.decode_sequences * row
        for name in ("d2h", "disk_write", "cpu_attention"):
            assert found[name] == pytest.approx(expected[name], abs=1e-3), name
        # A sequence whose cache holds n tokens reads ceil(n / 16) pages: n to n + 15 rows. The model says n + 1 + 7.5.
        off = (PAGE_TOKENS + 1) / 2 * row * load.decode_sequences
        for name, share in (("h2d", cache[1] - attended), ("disk_read", cache[2])):
            assert abs(found[name] - expected[name]) <= off * share + 1e-3, name


@pytest.mark.parametrize("activations", [CPU, DISK, HALVES], ids=["CPU", "disk", "CPU and disk"])
def test_activation_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: Any) -> None:
    """The model counts every layer; the executor hands the last one's hidden states to the head where they are."""
    passes, llm = run(folder, tmp_path, monkeypatch, RAGGED, {"percent": percent(activations=activations)})
    for each in passes:
        model = predictor(llm, each.load)
        shape, expected = model.shape, work(model, activations=activations)
        for name in ("h2d", "d2h", "disk_read", "disk_write"):
            predicted = expected[name] * (shape.num_layers - 1) / shape.num_layers
            # Pages of 16 rows go to the tier that is furthest behind: no tier is off by more than one page a layer.
            whole = name in ("h2d", "d2h") or activations != HALVES
            off = 0 if whole else (shape.num_layers - 1) * PAGE_TOKENS * shape.hidden_bytes
            assert abs(each.moved[name, "activations"] - predicted) <= off + 1e-3, name


def quantization_extra(shape: ModelShape, bits: int) -> int:
    """Bytes of a quantized layer that the model leaves out: groups end with rows, and norms are not quantized."""
    if bits == 16:
        return 0
    hidden, middle, group = shape.hidden_size, shape.intermediate_size, weight_group(shape.hidden_size)
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    matrices = ((heads + 2 * kv_heads, hidden), (hidden, heads), (2 * middle, hidden), (hidden, middle))
    groups = sum(rows * math.ceil(columns / group) - math.ceil(rows * columns / group) for rows, columns in matrices)
    return groups * 2 * shape.element_bytes + 2 * (shape.weight_bytes(hidden, 16) - shape.weight_bytes(hidden, bits))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("weights", [CPU, DISK], ids=["CPU", "disk"])
def test_weight_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any, bits: int) -> None:
    passes, llm = run(folder, tmp_path, monkeypatch, EQUAL, {"percent": percent(weights), "weight_bits": bits})
    name = "h2d" if weights == CPU else "disk_read"
    for number, each in enumerate(passes):
        model = predictor(llm, each.load)
        shape, expected = model.shape, work(model, weights)
        tokens = each.load.decode_sequences + each.load.prompt_tokens
        predicted = expected[name] - (tokens * shape.hidden_bytes if name == "h2d" else 0)
        # The first pass also fetches the first two layers of the second, and fetched its own itself.
        layers, tensors = shape.num_layers, len(shape.block_tensors)
        if number == 0:
            predicted, layers = predicted + 2 * shape.block_bytes(bits), layers + 2
        predicted += layers * quantization_extra(shape, bits)
        padding = (layers * tensors + len(shape.head_tensors)) * TENSOR_ALIGNMENT[name]
        found = each.moved[name, "weights"]
        assert -1e-3 <= found - predicted <= padding
        assert each.ticks == float(model.launch_seconds)
