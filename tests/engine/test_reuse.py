"""Converted layer files in --offload-dir: a second start takes them, another checkpoint, other bits or another dtype
do not."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from flexbatch import LLM, SamplingParams
from flexbatch.memory import conversion, layer_files
from flexbatch.models import fingerprint, shapes
from tests.grids import grid
from tests.tiny_models import LLAMA_SIZES, make_model, random_prompts

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPTS = random_prompts([3, 20, 41], seed=9)
ON_DISK = (0, 0, 100, 0, 100, 0)
ON_GPU_AND_CPU = (40, 60, 100, 0, 100, 0)


def start(folder, offload, **settings):
    """Tokens, and what the report says about loading."""
    with LLM(
        str(folder), device="cpu", offload_dir=str(offload), gpu_memory="1GiB", cpu_memory="1GiB", **settings
    ) as llm:
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
    """All weights on disk: nothing is read from the checkpoint, quantized or written again."""
    first, loaded, reused = start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=bits)
    assert loaded == (model / "model.safetensors").stat().st_size - header_bytes(model) and reused == 0
    before = files(tmp_path / "offload")
    assert before
    monkeypatch.setattr(conversion.ops, "quantize", None)
    monkeypatch.setattr(layer_files, "write_atomically", None)
    second, loaded, reused = start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=bits)
    assert (second, loaded, files(tmp_path / "offload")) == (first, 0, before)
    assert reused > 0


def header_bytes(model):
    return 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")


def test_quantized_weights_in_memory_come_from_files_too(model, tmp_path, monkeypatch):
    """What is left to read are the tensors that stay unquantized. Splits are no part of a file: another placement
    takes the same ones."""
    first, everything, _ = start(model, tmp_path / "offload", percent=ON_GPU_AND_CPU, weight_bits=4)
    before = files(tmp_path / "offload")
    monkeypatch.setattr(conversion.ops, "quantize", None)
    second, loaded, reused = start(model, tmp_path / "offload", percent=ON_GPU_AND_CPU, weight_bits=4)
    assert (second, files(tmp_path / "offload")) == (first, before)
    assert 0 < reused <= sum(path.stat().st_size for path in before)
    matrices = sum(
        parameter.numel() for name, parameter in parameters(model) if parameter.dim() == 2 and ".layers." in name
    )
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


@pytest.mark.parametrize(
    ("part", "bits"),
    grid(
        ["self_attn.o_proj", "mlp.down_proj", "layers.1.self_attn.k_proj", "layernorm", "embed_tokens", "lm_head"],
        [16, 8],
    ),
)
def test_a_part_that_was_retrained_is_never_taken_from_files(part, bits, model, tmp_path):
    """Equal names, shapes, sizes and times: one twentieth of the weights is enough."""
    path = model / "model.safetensors"
    status, tensors = path.stat(), dict(parameters(model))
    start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=bits)
    noise = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if part in name]:
        tensors[name] = tensors[name] + torch.randn(tensors[name].shape, generator=noise)
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    found = start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=bits)
    assert found == start(model, tmp_path / "elsewhere", percent=ON_DISK, weight_bits=bits) and found[2] == 0


def test_a_start_with_damaged_files_gives_the_same_tokens(model, tmp_path, caplog):
    first, _, _ = start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=4)
    for index, path in enumerate(sorted((tmp_path / "offload").rglob("*.bin"))):
        content = bytearray(path.read_bytes())
        content[997 * index % len(content)] ^= 16
        path.write_bytes(content)
    tokens, _, reused = start(model, tmp_path / "offload", percent=ON_DISK, weight_bits=4)
    assert (tokens, reused) == (first, 0) and "is written again" in caplog.text


def test_who_files_nothing_digests_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "file_digest", None)
    start(model, tmp_path / "offload", percent=(60, 40, 100, 0, 100, 0))
    with pytest.raises(TypeError):
        start(model, tmp_path / "offload", percent=(60, 40, 100, 0, 100, 0), weight_bits=8)


def test_random_weights_have_files_by_their_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", {"model_type": "llama", "vocab_size": 307, **LLAMA_SIZES})
    settings = {"dummy_weights": True, "percent": ON_DISK, "dtype": "float32"}
    first = start("tiny", tmp_path, **settings)
    assert first[2] == 0
    tokens, _, reused = start("../somebody/Tiny", tmp_path, **settings)
    assert tokens == first[0] and reused > 0
    other = start("tiny", tmp_path, **settings, seed=1)
    assert other[0] != first[0] and other[2] == 0
    assert len(list(tmp_path.iterdir())) == 2, "of two seeds"
