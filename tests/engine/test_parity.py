"""The engine's greedy tokens equal those of transformers for every placement, micro-batch shape, overlap and chunk
size."""

from __future__ import annotations

import itertools
import random

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.policy.limits import PAGE_TOKENS
from tests.grids import covering, sampled
from tests.tiny_models import NEW_TOKENS

WEIGHTS = {"gpu": (100, 0), "cpu": (0, 100), "disk": (0, 0), "mixed": (30, 40)}
CACHE = {"gpu": (100, 0), "cpu": (0, 100), "disk": (0, 0), "mixed": (40, 30)}
ACTIVATIONS = {"gpu": (100, 0), "cpu": (0, 100), "mixed": (30, 40)}
GRID = list(itertools.product(WEIGHTS, CACHE, ACTIVATIONS, (1, 2, 3), (True, False), (1, 7, 64)))
FAMILIES = ("opt", "opt-tiny", "llama", "llama-tied", "llama-single")
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)


def run(reference, offload_dir, cell, cpu_attention=0.0, **settings):
    weights, cache, activations, micro_batches, overlap, chunk = cell
    percent = WEIGHTS[weights] + CACHE[cache] + ACTIVATIONS[activations]
    with LLM(
        str(reference.folder),
        percent=percent,
        gpu_batch_size=3,
        num_gpu_batches=micro_batches,
        overlap=overlap,
        prefill_chunk=chunk,
        cpu_attention=cpu_attention,
        gpu_memory="1GiB",
        cpu_memory="1GiB",
        offload_dir=str(offload_dir),
        device="cpu",
        **settings,
    ) as llm:
        completions = llm.generate(reference.prompts, GREEDY)
        assert llm.runner is not None
        assert_realized(llm.report(), llm.runner)
        llm.runner.check()
        llm.weights.check()
        llm.tiers.check()
    return [completion.token_ids for completion in completions]


def assert_realized(report, block):
    """What is printed is what was: within one tensor, one sequence and one page of what was asked."""
    asked, found = report["policy"], report["realized_percent"]
    rows, sequences = sum(block.activations.realized.values()), sum(block.cache.peak_open.values())
    largest = max(tensor.num_bytes for tensor in block.executor.weights.plan.all_tensors)
    total = sum(tensor.num_bytes for tensor in block.executor.weights.plan.all_tensors)
    units = {"weights": 100 * largest / total, "cache": 100 / sequences, "activations": 100 * PAGE_TOKENS / rows}
    for kind, unit in units.items():
        for tier in ("gpu", "cpu", "disk"):
            assert abs(found[kind][tier] - 100 * asked[kind][tier]) <= unit + 1e-6, (
                kind,
                tier,
                found[kind],
                asked[kind],
            )


def pairwise() -> list[tuple[str, tuple]]:
    """Families with cells in which any two values of two axes, or of one and a family, occur together; without the
    slowest chunk size on slow tiers."""
    cheap = [cell for cell in GRID if cell[5] != 1 or (cell[0], cell[1]) == ("gpu", "gpu")]
    rows = [(family, *cell) for family in FAMILIES for cell in cheap]
    random.Random(0).shuffle(rows)
    pairs = {row: {*itertools.combinations(enumerate(row), 2)} for row in rows}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    return [(family, tuple(cell)) for family, *cell in chosen]


PAIRWISE = pairwise()
QUICK = [PAIRWISE[placement] for placement in covering([(family, *cell) for family, cell in PAIRWISE])]
"""Every value of every axis, and every family: the slow run has all the pairs."""


@pytest.mark.parametrize(
    ("family", "cell"),
    [pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow) for row in PAIRWISE],
    ids=str,
)
def test_sampled_grid(family, cell, reference, tmp_path):
    model = reference(family)
    assert run(model, tmp_path, cell) == model.token_ids


CPU_ATTENTION = list(itertools.product((1, 2, 3), (True, False), (0.5, 1.0)))


@pytest.mark.parametrize(("micro_batches", "overlap", "cpu_attention"), sampled(CPU_ATTENTION))
def test_attention_on_the_cpu(micro_batches, overlap, cpu_attention, reference, tmp_path):
    model = reference("llama")
    assert run(model, tmp_path, ("cpu", "mixed", "gpu", micro_batches, overlap, 64), cpu_attention) == model.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("cell", GRID, ids=str)
def test_whole_grid(family, cell, reference, tmp_path_factory):
    model = reference(family)
    folder = tmp_path_factory.getbasetemp() / f"offload-{family}"
    assert run(model, folder, cell) == model.token_ids


SPREAD = {"disk": (("disk", "disk", "mixed", 2, True, 7), 0), "mixed": (("mixed", "cpu", "cpu", 3, False, 33), 0.5)}


@pytest.mark.parametrize(
    ("weight_bits", "cache_bits", "spread"),
    sampled((*bits, name) for bits in [(4, 16), (8, 8), (16, 4), (4, 4)] for name in SPREAD),
)
def test_compressed_tokens_depend_on_nothing_but_the_bits(weight_bits, cache_bits, spread, reference, tmp_path):
    """Quantized weights and cache change the tokens, but placement, chunking and overlap may not."""
    model = reference("llama")
    outputs = [
        run(model, tmp_path, cell, share, weight_bits=weight_bits, cache_bits=cache_bits)
        for cell, share in ((("gpu", "gpu", "gpu", 1, True, 64), 0), SPREAD[spread])
    ]
    assert outputs[0] == outputs[1]


def test_a_request_does_not_depend_on_the_batch(reference, tmp_path):
    """Alone, in a batch of 50, and in another order: the same tokens, greedy and drawn."""
    model = reference("llama")
    prompts = [[*prompt, i + 3] for i in range(5) for prompt in model.prompts]
    params = [SamplingParams(max_tokens=8, temperature=0.0 if i % 2 else 0.9, seed=i) for i in range(len(prompts))]
    settings = {
        "gpu_batch_size": 7,
        "num_gpu_batches": 3,
        "gpu_memory": "1GiB",
        "cpu_memory": "1GiB",
        "percent": (50, 50, 50, 50, 100, 0),
        "device": "cpu",
    }
    with LLM(str(model.folder), **settings) as llm:
        together = [completion.token_ids for completion in llm.generate(prompts, params)]
        for i in (0, 7, 23, 49):
            assert llm.generate([prompts[i]], params[i])[0].token_ids == together[i]
        order = random.Random(0).sample(range(len(prompts)), len(prompts))
        permuted = llm.generate([prompts[i] for i in order], [params[i] for i in order])
        assert [completion.token_ids for completion in permuted] == [together[i] for i in order]
