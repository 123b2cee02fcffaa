"""Budgets of the tiers, and what a job requires of them before anything is loaded."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from flexbatch import LLM
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.models import families
from flexbatch.planner import budgets
from flexbatch.policy.hardware import load_hardware
from flexbatch.validation.errors import ConfigurationError, DoesNotFitError

GIB = 2**30
CPU = torch.device("cpu")
JOB = Job((40,) * 12, (30,) * 12)
PLACED = {
    "model": "opt-125m",
    "device": "cpu",
    "hardware": "cpu",
    "dummy_weights": True,
    "percent": (50, 50, 50, 50, 50, 50),
    "gpu_batch_size": 4,
    "num_gpu_batches": 2,
    "prefill_chunk": 32,
    "prefill_budget": 64,
    "cpu_attention": 0.0,
    "gpu_memory": "2GiB",
    "cpu_memory": "2GiB",
}


def required(job: Job = JOB, **changed) -> Counter[tuple[str, str]]:
    """(what, tier) -> bytes."""
    report = LLM.plan(EngineConfig(**{**PLACED, **changed}), job)
    return Counter({(row["what"], row["tier"]): row["num_bytes"] for row in report["memory"]})


def test_budgets_that_are_given_stay_and_the_rest_is_the_machines() -> None:
    machine = load_hardware("t4")
    named = budgets.resolve_budgets(EngineConfig(model="m", cpu_memory="3GiB"), CPU, machine)
    assert named == {
        "gpu": machine.gpu_memory_bytes - machine.gpu_reserved_bytes,
        "cpu": 3 * GIB,
        "disk": machine.disk_bytes,
    }


def test_without_a_gpu_both_tiers_share_the_memory_of_the_host(monkeypatch, tmp_path) -> None:
    """The disk is that of the offload folder, or of the first folder above it that there is."""
    monkeypatch.setattr(budgets, "host_memory_bytes", lambda: 100 * GIB)
    config = EngineConfig(model="m", offload_dir=str(tmp_path / "not" / "there"))
    found = budgets.resolve_budgets(config, CPU)
    assert found["gpu"] == found["cpu"] == 45 * GIB and found["disk"] > 0


@pytest.mark.parametrize("name", ["gpu", "tpu:0", "meta"])
def test_other_devices_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"device '{name}'"):
        budgets.resolve_device(name)


@pytest.mark.parametrize(
    ("device", "checkpoint", "dtype"),
    [
        ("cpu", "float16", torch.float32),
        ("cuda", "float16", torch.float16),
        ("cuda", "bfloat16", torch.bfloat16),
        ("cuda", "float32", torch.bfloat16),
    ],
)
def test_the_compute_dtype_follows_device_and_checkpoint(device: str, checkpoint: str, dtype: torch.dtype) -> None:
    config = {"model_type": "opt", "vocab_size": 50, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    arch = families.read_arch(
        {**config, "num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
        | {"torch_dtype": checkpoint, "eos_token_id": 2, "bos_token_id": 2}
    )
    assert budgets.resolve_dtype("auto", arch, torch.device(device)) == dtype
    assert budgets.resolve_dtype("float16", arch, torch.device(device)) == torch.float16


def test_requirements_follow_the_placement() -> None:
    """The weights lie where their share says; a tier without a share of a kind has no row of it."""
    half, resident = required(), required(percent=(100, 0, 100, 0, 100, 0))
    assert half["weights", "gpu"] + half["weights", "cpu"] == resident["weights", "gpu"]
    # Each tier has room for one sequence more than its share of eight.
    assert 8 * (half["cache", "gpu"] + half["cache", "cpu"]) == 10 * resident["cache", "gpu"]
    assert {tier for what, tier in resident if what in ("weights", "cache", "activations")} == {"gpu"}
    assert all(half.values()) and all(resident.values()), "rows of nothing are left out"


def test_the_cache_grows_with_the_sequences_in_flight_and_with_their_length() -> None:
    resident = {"percent": (100, 0, 100, 0, 100, 0)}
    one, two = required(**resident, num_gpu_batches=1), required(**resident, num_gpu_batches=2)
    assert two["cache", "gpu"] == 2 * one["cache", "gpu"]
    longer = required(Job((400,) * 12, (30,) * 12), **resident, num_gpu_batches=1)
    assert longer["cache", "gpu"] > 5 * one["cache", "gpu"]
    assert longer["weights", "gpu"] == one["weights", "gpu"]


def test_a_byte_less_than_required_is_refused() -> None:
    rows = required()
    sums = {tier: sum(size for (_, where), size in rows.items() if where == tier) for tier in ("gpu", "cpu")}
    assert required(**{f"{tier}_memory": size for tier, size in sums.items()}) == rows
    with pytest.raises(DoesNotFitError, match="does not fit"):
        required(gpu_memory=sums["gpu"] - 1, cpu_memory=sums["cpu"], reserve="all")


def test_a_block_that_the_user_fixed_has_fewer_pages_where_memory_is_short() -> None:
    """Sequences take them as they grow. Where one cannot reach its end, nothing helps."""
    settings: dict[str, Any] = {"percent": (100, 0, 100, 0, 100, 0)}
    job = Job((400,) * 12, (30,) * 12)
    rows = required(job, **settings)
    without_cache = sum(rows.values()) - rows["cache", "gpu"]
    one = rows["cache", "gpu"] // 8
    fewer = required(job, **settings, gpu_memory=without_cache + rows["cache", "gpu"] // 2)
    assert one <= fewer["cache", "gpu"] <= rows["cache", "gpu"] // 2
    assert {key: size for key, size in fewer.items() if key[0] != "cache"} == {
        key: size for key, size in rows.items() if key[0] != "cache"
    }
    with pytest.raises(DoesNotFitError, match="does not fit"):
        required(job, **settings, gpu_memory=without_cache + one - 1)


@pytest.mark.parametrize("dry", [False, True])
def test_budgets_above_what_is_free_are_cut_with_a_line_unless_nothing_is_run(
    monkeypatch, tmp_path, caplog, dry
) -> None:
    monkeypatch.setattr(budgets, "host_memory_bytes", lambda: 100 * GIB)
    config = EngineConfig(model="m", gpu_memory="1000GiB", cpu_memory="100GiB", offload_dir=str(tmp_path))
    found = budgets.resolve_budgets(config, CPU, dry=dry)
    assert (found["gpu"], found["cpu"]) == ((1000 if dry else 45) * GIB, 100 * GIB)
    (line,) = caplog.messages
    assert line.startswith("--gpu-memory 1000.000 GiB is more than the 100.000 GiB that are free here: ")
    assert line.endswith("the plan is for a machine that has it" if dry else "going on with 45.000 GiB")
