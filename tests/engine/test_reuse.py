"""Converted layer files in --offload-dir: a second start takes them, another checkpoint, other bits or another dtype do not."""

from __future__ import annotations

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.memory import loading
from tests.tiny_models import make_model, random_prompts

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPTS = random_prompts([3, 20, 41], seed=9)
ON_DISK = (0, 0, 100, 0, 100, 0)
ON_GPU_AND_CPU = (40, 60, 100, 0, 100, 0)


def start(folder, offload, **settings):
    """Tokens, and what the report says about loading."""
    with LLM(str(folder), device="cpu", offload_dir=str(offload), gpu_memory="1GiB", cpu_memory="1GiB", **settings) as llm:
        completions = llm.generate(PROMPTS, GREEDY)
        report = llm.report()
    return [completion.token_ids for completion in completions], report["loaded_bytes"], report["reused_bytes"]


def files(offload):
    """What a rewritten file cannot keep: inode and time of the last change."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(offload.rglob("*.bin"))}


@pytest.fixture
def model(tmp_path):
    make_model("llama", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("bits", [16, 4])
def test_a_second_start_skips_the_work(bits, model, tmp_path, monkeypatch):
    """All weights on disk: nothing is read from the checkpoint, quantised or written again."""
    first, loaded, reused = start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=bits)
    assert loaded == (model / "model.safetensors").stat().st_size - header_bytes(model) and reused == 0
    before = files(tmp_path / "offload")
    assert before
    monkeypatch.setattr(loading.ops, "quantize", None)
    monkeypatch.setattr(loading, "write_atomically", None)
    second, loaded, reused = start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=bits)
    assert (second, loaded, files(tmp_path / "offload")) == (first, 0, before)
    assert reused > 0


def header_bytes(model):
    return 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")


def test_quantised_weights_in_memory_come_from_files_too(model, tmp_path, monkeypatch):
    """What is left to read are the tensors that stay unquantised. Splits are no part of a file: another placement takes the same ones."""
    first, everything, _ = start(model, tmp_path / "offload", percent=ON_GPU_AND_CPU, weight_bits=4)
    before = files(tmp_path / "offload")
    monkeypatch.setattr(loading.ops, "quantize", None)
    second, loaded, reused = start(model, tmp_path / "offload", percent=ON_GPU_AND_CPU, weight_bits=4)
    assert (second, files(tmp_path / "offload")) == (first, before)
    assert 0 < reused <= sum(path.stat().st_size for path in before)
    matrices = sum(parameter.numel() for name, parameter in parameters(model) if parameter.dim() == 2 and ".layers." in name)
    assert everything - loaded == 4 * matrices
    third, _, _ = start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=4)
    assert third == first and before.items() <= files(tmp_path / "offload").items()


def parameters(model):
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors").items()


def test_another_checkpoint_is_not_mistaken_for_the_first(model, tmp_path):
    """Retrained in place: same names, shapes and sizes."""
    first, loaded, _ = start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=4)
    before = files(tmp_path / "offload")
    make_model("llama", model, seed=1)
    second, loaded_again, reused = start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=4)
    assert (loaded_again, reused) == (loaded, 0) and second != first
    assert second == start(model, tmp_path / "elsewhere", percent=ON_DISK, weight_bits=4)[0]
    assert before.items() < files(tmp_path / "offload").items()


@pytest.mark.parametrize("changed", [{"weight_bits": 8}, {"weight_bits": 16}, {"dtype": "bfloat16"}])
def test_other_bits_and_dtypes_have_files_of_their_own(changed, model, tmp_path):
    start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=4)
    before = files(tmp_path / "offload")
    tokens, _, _ = start(model, tmp_path / "offload", percent=ON_DISK, **{"weight_bits": 4, **changed})
    assert tokens == start(model, tmp_path / "elsewhere", percent=ON_DISK, **{"weight_bits": 4, **changed})[0]
    after = files(tmp_path / "offload")
    assert before.items() < after.items()
