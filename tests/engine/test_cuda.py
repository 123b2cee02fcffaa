"""The parity grid on a GPU, in float32; and that a pass allocates nothing from the driver once it is warm."""

from __future__ import annotations

import random

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.execution.runner import keep_workspace
from flexbatch.memory import cache_storage, host_buffers
from tests.engine.device_memory import ALLOCATED, watched, without_collector
from tests.engine.test_parity import ACTIVATIONS, CACHE, GRID, NEW_TOKENS, WEIGHTS
from tests.tiny_models import make_model

pytestmark = pytest.mark.gpu
WARM_JOBS = 4
"""After the first, at most."""
CLOSED = [
    ("gpu", "gpu", "gpu", 1, True, 64),
    ("cpu", "mixed", "gpu", 2, True, 64),
    ("disk", "disk", "mixed", 3, True, 7),
]
CELLS = random.Random(1).sample([cell for cell in GRID if cell[5] != 1], 24)


def engine(reference, tmp_path, cell, **settings):
    weights, cache, activations, micro_batches, overlap, chunk = cell
    return LLM(
        str(reference.folder),
        percent=WEIGHTS[weights] + CACHE[cache] + ACTIVATIONS[activations],
        num_gpu_batches=micro_batches,
        overlap=overlap,
        prefill_chunk=chunk,
        gpu_memory="2GiB",
        cpu_memory="2GiB",
        offload_dir=str(tmp_path),
        device="cuda",
        **{"dtype": "float32", "gpu_batch_size": 3, **settings},
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


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("few", [True, False])
def test_few_rows_and_many_go_their_ways_with_the_same_tokens(few, micro_batches, reference, tmp_path, monkeypatch):
    """To the CPU's attention, and home from staging. All that a tiny model has is few."""
    model = reference("opt")
    if not few:
        monkeypatch.setattr(host_buffers, "ROWS_BYTES", 0)
        monkeypatch.setattr(cache_storage, "FEW_BYTES", 0)
    with engine(model, tmp_path, ("cpu", "cpu", "gpu", micro_batches, True, 64), cpu_attention=0.5) as llm:
        completions = llm.generate(model.prompts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0))
        queues, buffers = llm.queues, llm.runner.host_buffers
        assert any(parts.rows is not None for parts in buffers.parts.values()) == few
        for queue in (queues.h2d, queues) if few else (queues.h2d, queues.d2h, queues):
            assert queue.events.free, "no event comes back"
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
            assert llm.runner is not None
            graphs = llm.runner.executor.graphs
            assert (graphs is not None and len(graphs.captured) > 0) == overlap
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("bits", [(4, 4), (8, 8)])
def test_compressed_placements_agree(bits, reference, tmp_path):
    model = reference("llama")
    outputs = []
    for cell in (
        ("gpu", "gpu", "gpu", 1, True, 64),
        ("mixed", "mixed", "mixed", 2, True, 7),
        ("disk", "disk", "cpu", 3, True, 64),
    ):
        with engine(model, tmp_path, cell, weight_bits=bits[0], cache_bits=bits[1]) as llm:
            outputs.append(
                [
                    completion.token_ids
                    for completion in llm.generate(model.prompts, SamplingParams(max_tokens=8, temperature=0))
                ]
            )
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_warm_pass_asks_the_driver_for_nothing(reference, tmp_path):
    """What a copy still reads comes back to torch's allocator when the copy is done: how much is out at one time
    depends on who else uses the GPU, and a later job may need a block more than the first. That has to end."""
    model, jobs = reference("llama"), []
    with engine(model, tmp_path, ("cpu", "mixed", "gpu", 2, True, 64), dtype="bfloat16") as llm:
        llm.generate(model.prompts, SamplingParams(max_tokens=8, temperature=0))
        while not jobs or (jobs[-1].changes and len(jobs) < WARM_JOBS):
            with watched() as job:
                llm.generate(model.prompts, SamplingParams(max_tokens=8, temperature=0))
            jobs.append(job)
            assert ALLOCATED not in job.changes, str(job)
    assert not jobs[-1].changes, "\n".join(map(str, jobs))


@pytest.mark.parametrize("settings", [{}, {"weight_bits": 4, "cache_bits": 4}], ids=["16", "4"])
@pytest.mark.parametrize("cell", CLOSED, ids=str)
def test_a_closed_engine_gives_its_memory_back_at_once(cell, settings, reference, tmp_path):
    """While it is held, and without the collector. The first of two leaves what cuBLAS keeps for each stream."""
    model = reference("llama")
    for _ in range(2):
        with without_collector(), watched() as closed:
            llm = engine(model, tmp_path, cell, dtype="bfloat16", **settings)
            for _ in range(3):  # graphs of its passes are recorded
                llm.generate(model.prompts, SamplingParams(max_tokens=8, temperature=0))
            llm.close()
    assert closed.changes.get(ALLOCATED, 0) == 0, str(closed)


@pytest.mark.alone
def test_graphs_take_what_is_planned_for_them(reference, tmp_path):
    """More buckets than are kept, by the driver's own count of what is free."""
    model = reference("llama")
    with engine(model, tmp_path, ("gpu", "gpu", "gpu", 1, True, 64), gpu_batch_size=64, dtype="bfloat16") as llm:
        prompts = [model.prompts[3]] * 64
        params = [SamplingParams(max_tokens=4 + 5 * i, temperature=0, ignore_eos=True) for i in range(64)]
        llm.prepare(
            prompts, params
        )  # the block of the job itself: a smaller one would be replaced, and its graphs with it
        llm.generate(prompts, [SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)] * 64)
        assert llm.runner is not None
        graphs = llm.runner.executor.graphs
        assert graphs is not None
        llm.runner.executor.clear_graphs()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        for _ in range(3):
            llm.generate(prompts, params)
        llm.runner.check()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        (planned,) = [row["num_bytes"] for row in llm.report()["memory"] if row["what"].startswith("decode graphs")]
        taken = before - torch.cuda.mem_get_info()[0]
        assert 0 < len(graphs.captured) <= graphs.most
        assert taken <= planned, f"{len(graphs.captured)} graphs take {taken} bytes, planned are {planned}"


def test_rotary_tables_are_there_once(tmp_path):
    """A context of two million positions: the device holds those of the block's longest sequence."""
    make_model("llama", tmp_path / "model", max_position_embeddings=2_000_000)
    before = torch.cuda.memory_allocated()
    with LLM(
        str(tmp_path / "model"),
        percent=(100, 0, 100, 0, 100, 0),
        gpu_batch_size=2,
        num_gpu_batches=1,
        gpu_memory="1GiB",
        device="cuda",
    ) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0))
        # The table of all positions takes 256 MB; pages that are left over for growing sequences take up to 64 MB.
        assert torch.cuda.memory_allocated() - before < 128 << 20


def test_the_workspace_of_passes_is_kept_in_one_block():
    """Tensors of any sizes within it take nothing more of the device."""
    torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated()
    keep_workspace(torch.device("cuda"), 256 << 20)
    kept = torch.cuda.memory_reserved()
    assert torch.cuda.memory_allocated() == allocated and kept >= 256 << 20
    for size in (10, 11, 13, 17, 19):
        held = [torch.empty(size << 20, dtype=torch.uint8, device="cuda") for _ in range(10)]
        assert torch.cuda.memory_reserved() == kept
        del held
    keep_workspace(torch.device("cuda"), 1 << 50)  # more than there is
