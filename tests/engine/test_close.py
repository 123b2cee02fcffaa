"""An engine that is closed holds no tensor any more, and needs no garbage collector for that: whoever opens the next
one at once has all memory for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.validation.errors import EngineClosedError
from tests.engine.device_memory import without_collector
from tests.engine.test_parity import ACTIVATIONS, CACHE, WEIGHTS
from tests.grids import grid
from tests.peft_folders import linear_modules, write_adapter
from tests.tiny_models import make_model, random_prompts

PROMPTS = random_prompts([1, 29, 7, 60], seed=3)
PARAMS = SamplingParams(max_tokens=8, temperature=0, logprobs=2)
CELLS = {
    "resident": ("gpu", "gpu", "gpu", 1, True, 64),
    "streamed": ("cpu", "mixed", "gpu", 2, True, 64),
    "mixed": ("mixed", "mixed", "mixed", 2, True, 7),
    "disk": ("disk", "disk", "cpu", 3, True, 64),
    "waits": ("disk", "mixed", "mixed", 2, False, 7),
}
VARIANTS = {
    "opt": {},
    "llama": {},
    "llama-4-bits": {"weight_bits": 4, "cache_bits": 4},
    "llama-cpu-attention": {"cpu_attention": 1.0},
    "llama-ngram": {"draft": "ngram", "tree": "chain:3"},
    "gemma2": {},  # windows
    "mixtral": {"cpu_experts": 0.5},
    "deepseek_v2": {},  # a latent cache, and experts that come as they are hit
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By family, a folder each, made when it is asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            make_model(family, made[family])
        return made[family]

    return folder


@pytest.fixture
def no_collector() -> Iterator[None]:
    with without_collector():
        yield


def storages() -> dict[int, tuple[int, tuple[int, ...]]]:
    """(bytes, shape of a tensor in it) of the memory of all tensors that Python knows, by its address."""
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.untyped_storage().nbytes():
            found[each.untyped_storage()._cdata] = each.untyped_storage().nbytes(), tuple(each.shape)
    return found


def engine(folder, tmp_path, cell, **settings):
    weights, cache, activations, micro_batches, overlap, chunk = CELLS[cell]
    percent = WEIGHTS[weights] + CACHE[cache] + ACTIVATIONS[activations]
    shared = {"gpu_memory": "1GiB", "cpu_memory": "1GiB", "offload_dir": str(tmp_path / "off"), "device": "cpu"}
    schedule = {"gpu_batch_size": 3, "num_gpu_batches": micro_batches, "overlap": overlap, "prefill_chunk": chunk}
    return LLM(str(folder), percent=percent, dtype="float32", **schedule, **shared, **settings)


def left_by(llm, before, run=lambda llm: llm.generate(PROMPTS, PARAMS)):
    """What a job, and closing, leave of an engine that is still held."""
    run(llm)
    assert set(storages()) - set(before)  # the count sees what there is
    llm.close()
    return [size for address, size in storages().items() if address not in before]


@pytest.mark.parametrize(("variant", "cell"), grid(VARIANTS, CELLS))
def test_a_closed_engine_holds_no_tensor(variant, cell, models, tmp_path, no_collector):
    family = variant.split("-")[0]
    folder, before = models(family), storages()
    llm = engine(folder, tmp_path, cell, **VARIANTS[variant])
    assert left_by(llm, before) == []


def test_nor_does_one_with_adapters_and_a_draft(models, tmp_path, no_collector):
    from transformers import AutoModelForCausalLM

    folder = models("llama")
    reference = AutoModelForCausalLM.from_pretrained(folder)
    write_adapter(tmp_path / "adapter", reference, linear_modules(reference))
    del reference
    gc.collect()
    before = storages()
    llm = engine(folder, tmp_path, "mixed", lora={"a": str(tmp_path / "adapter")}, lora_default="a")
    assert left_by(llm, before) == []
    llm = engine(folder, tmp_path, "mixed", draft=str(folder), tree="<2,1>")
    assert left_by(llm, before) == []


def test_nor_one_whose_stream_was_open(models, tmp_path, no_collector):
    folder, before = models("llama"), storages()
    llm, rests = engine(folder, tmp_path, "streamed"), []

    def begin(llm):
        rests.append(llm.stream((i, prompt, PARAMS) for i, prompt in enumerate(PROMPTS)))
        next(rests[0])

    assert left_by(llm, before, begin) == []


def test_a_closed_engine_loads_nothing_again(models, tmp_path):
    llm = engine(models("llama"), tmp_path, "resident")
    assert llm.weights is not None
    llm.close()
    with pytest.raises(EngineClosedError, match="weights: this LLM is closed"):
        _ = llm.weights
