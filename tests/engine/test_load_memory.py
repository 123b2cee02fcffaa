"""Loading holds what lives in memory and one tensor more, never the whole model beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import make_model

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
SCRIPT = """
import json, sys, threading
from flexbatch import engine
from flexbatch.planner import loader

def held():
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    # Files that are mapped can be dropped at any time.
    return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))

def watched(*arguments):
    before = held()
    def watch():
        while not done.wait(0.001):
            seen.append(held() - before)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return load(*arguments)
    finally:
        done.set()
        thread.join()

load, seen, done = loader.PlacedModel.place, [], threading.Event()
loader.PlacedModel.place = watched
with engine.LLM(**json.loads(sys.argv[1])) as llm:
    llm.weights
    pools = (llm.tiers.gpu, llm.tiers.cpu)
    homes = sum(size for pool in pools for name, size in pool.used_bytes.items() if name.startswith("weights "))
print(json.dumps([max(seen), homes]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """75 MB, the largest tensor 3 MB, the largest of the fused ones 6 MB."""
    folder = tmp_path_factory.mktemp("large")
    make_model(
        "llama",
        folder,
        num_hidden_layers=6,
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=8,
        head_dim=64,
    )
    return folder


@pytest.mark.parametrize(
    ("form", "percent", "bits"),
    [
        ("safetensors", (0, 0), 16),
        pytest.param("bin", (0, 100), 16, marks=pytest.mark.slow),
        pytest.param("safetensors", (20, 40), 8, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_model_is_never_in_memory_twice(form, percent, bits, folder, tmp_path):
    if form == "bin":
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / file.name).symlink_to(file)
        torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    settings = {
        "model": str(tmp_path if form == "bin" else folder),
        "percent": [*percent, 100, 0, 100, 0],
        "weight_bits": bits,
        "device": "cpu",
    }
    settings |= {
        "gpu_memory": "512MiB",
        "cpu_memory": "512MiB",
        "offload_dir": str(tmp_path / "offload"),
        "gpu_batch_size": 1,
        "num_gpu_batches": 1,
    }
    # What is freed goes back at once. By default glibc raises this limit to the size of the tensors that it has seen,
    # and each thread keeps free ones for itself: 12 to 19 MiB by chance on two cores, 32 on sixteen busy ones.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    words = [sys.executable, "-c", SCRIPT, json.dumps(settings)]
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    peak, homes = json.loads(done.stdout)
    # A fused tensor, its parts, and a copy that is aligned for the disk: 6.2 MiB without tensors in memory.
    assert peak < homes + 24 * MIB, (peak / MIB, homes / MIB)
