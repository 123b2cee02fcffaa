"""The parity grid on a GPU, in float32; and that a pass allocates nothing from the driver once it is warm."""

from __future__ import annotations

import random

import pytest
import torch

from flexbatch import LLM, SamplingParams
from tests.engine.test_parity import ACTIVATIONS, CACHE, GRID, NEW_TOKENS, WEIGHTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CELLS = random.Random(1).sample([cell for cell in GRID if cell[5] != 1], 24)


def engine(reference, tmp_path, cell, **settings):
    weights, cache, activations, micro_batches, overlap, chunk = cell
    return LLM(
        str(reference.folder),
        percent=WEIGHTS[weights] + CACHE[cache] + ACTIVATIONS[activations],
        gpu_batch_size=3,
        num_gpu_batches=micro_batches,
        overlap=overlap,
        prefill_chunk=chunk,
        gpu_memory="2GiB",
        cpu_memory="2GiB",
        offload_dir=str(tmp_path),
        device="cuda",
        **{"dtype": "float32", **settings},
    )


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_grid_on_the_gpu(family, cell, reference, tmp_path):
    model = reference(family)
    with engine(model, tmp_path, cell, cpu_attention=random.Random(str(cell)).choice([0.0, 0.5, 1.0])) as llm:
        completions = llm.generate(model.prompts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0))
    assert [completion.token_ids for completion in completions] == model.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("cell", GRID, ids=str)
def test_whole_grid_on_the_gpu(family, cell, reference, tmp_path_factory):
    model = reference(family)
    with engine(model, tmp_path_factory.getbasetemp() / f"offload-{family}", cell) as llm:
        completions = llm.generate(model.prompts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0))
    assert [completion.token_ids for completion in completions] == model.token_ids


@pytest.mark.parametrize("weight_bits", [16, 4])
def test_decode_graphs_give_the_same_tokens(weight_bits, reference, tmp_path):
    """Two jobs, so that buckets come again and are captured; sequences end one by one, so that places are padded."""
    model = reference("opt")
    params = [SamplingParams(max_tokens=5 + 3 * i, temperature=0) for i in range(len(model.prompts))]
    outputs = []
    for overlap in (True, False):
        with engine(model, tmp_path, ("gpu", "gpu", "gpu", 1, overlap, 64), weight_bits=weight_bits) as llm:
            for _ in range(2):
                outputs.append([completion.token_ids for completion in llm.generate(model.prompts, params)])
            assert llm.block is not None
            graphs = llm.block.executor.graphs
            assert (graphs is not None and len(graphs.captured) > 0) == overlap
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("bits", [(4, 4), (8, 8)])
def test_compressed_placements_agree(bits, reference, tmp_path):
    model = reference("llama")
    outputs = []
    for cell in (("gpu", "gpu", "gpu", 1, True, 64), ("mixed", "mixed", "mixed", 2, True, 7), ("disk", "disk", "cpu", 3, True, 64)):
        with engine(model, tmp_path, cell, weight_bits=bits[0], cache_bits=bits[1]) as llm:
            outputs.append([completion.token_ids for completion in llm.generate(model.prompts, SamplingParams(max_tokens=8, temperature=0))])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_warm_pass_asks_the_driver_for_nothing(reference, tmp_path):
    model = reference("llama")
    with engine(model, tmp_path, ("cpu", "mixed", "gpu", 2, True, 64), dtype="bfloat16") as llm:
        llm.generate(model.prompts, SamplingParams(max_tokens=8, temperature=0))
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()
        llm.generate(model.prompts, SamplingParams(max_tokens=8, temperature=0))
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
    for name in ("num_device_alloc", "num_device_free", "reserved_bytes.all.current", "allocated_bytes.all.current"):
        assert before[name] == after[name], name
