"""Which mesh is chosen for how many GPUs, and what sums over GPUs cost in a plan."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from flexbatch.cli.plan import main
from flexbatch.config import EngineConfig
from flexbatch.parallel.mesh import MeshShape
from flexbatch.planner import meshes
from flexbatch.planner.meshes import NO_ROOM, Meshes, MeshPlan, gpus_here, shapes_of, with_chosen_mesh
from flexbatch.policy.affine import point_of
from flexbatch.policy.cost import PassModel
from flexbatch.policy.curve import Curve
from flexbatch.policy.hardware import Hardware, load_hardware
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.shared_host import shared_by
from flexbatch.validation.errors import ConfigurationError, DoesNotFitError

JOB = ["--num-prompts", "64", "--prompt-len", "64", "--max-tokens", "16"]
BLOCK = ["--gpu-batch-size", "16", "--num-gpu-batches", "2"]
"""Where nothing about them is asked: a search takes a second."""


@dataclasses.dataclass(frozen=True)
class Priced:
    """As much of a plan as is compared."""

    predicted_tokens_per_second: float
    limiting_resource: str = "h2d"
    pass_seconds: float = 1.0
    limiting_seconds: float = 0.5
    hardware: Hardware = dataclasses.field(default_factory=lambda: load_hardware("h200"))
    memory: dict = dataclasses.field(default_factory=lambda: {"cpu": {"weights": 2**30}, "disk": {}})


def test_every_product_of_the_number_of_gpus_is_planned_for():
    found = [(each.data, each.pipeline, each.tensor) for each in shapes_of(6)]
    assert found[:5] == [(6, 1, 1), (3, 1, 2), (3, 2, 1), (2, 1, 3), (2, 3, 1)]
    assert found[5:] == [(1, 1, 6), (1, 2, 3), (1, 3, 2), (1, 6, 1)]
    assert [*shapes_of(1)] == [MeshShape()]


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        ((10.0, 15.0, 12.0), (2, 1, 1)),  # 20 by two engines
        ((10.0, 21.0, 20.0), (1, 1, 2)),
        ((10.0, 21.0, 21.2), (1, 1, 2)),  # as fast as a plan can tell: the one with less in flight
        ((10.0, 20.2, 20.1), (2, 1, 1)),  # engines that wait for nobody
        ((10.0, 15.0, 22.0), (1, 2, 1)),
        ((DoesNotFitError(), 3.0, DoesNotFitError()), (1, 1, 2)),
        ((3.0, ConfigurationError("2 of 1 head"), 5.0), (2, 1, 1)),
        ((DoesNotFitError(), ConfigurationError("2 of 1 head"), 5.0), (1, 2, 1)),
    ],
)
def test_the_fastest_is_chosen_and_the_table_says_why(rates, wanted):
    def plan(config: EngineConfig) -> Priced:
        assert config.parallel is None
        found = rates[{(2, 1): 0, (1, 1): 1, (1, 2): 2}[config.data_parallel_size, config.pipeline_parallel_size]]
        if isinstance(found, Exception):
            raise found
        return Priced(found)

    meshes = Meshes.planned(EngineConfig(parallel="auto"), 2, plan)
    config = meshes.config(EngineConfig(parallel="auto"))
    assert config.mesh_shape == MeshShape(*wanted) and config.parallel is None
    text, flags = meshes.text(), zip(("data", "pipeline", "tensor"), wanted, strict=True)
    assert " ".join(f"--{name}-parallel-size {size}" for name, size in flags) in text and "100%" in text
    for found in rates:
        if isinstance(found, Exception):
            assert (str(found) or NO_ROOM) in text


def test_where_nothing_runs_every_mesh_says_why():
    refused = MeshPlan(MeshShape(tensor=2), None, "1 head")
    with pytest.raises(DoesNotFitError, match=r"2 x 1 x 1: does not fit.*; 1 x 1 x 2: 1 head"):
        _ = Meshes((MeshPlan(MeshShape(2), None, NO_ROOM), refused)).best
    with pytest.raises(ConfigurationError, match="1 x 1 x 2: 1 head"):
        _ = Meshes((refused,)).best


def test_without_gpus_there_is_one_engine():
    config = EngineConfig(parallel="auto", device="cpu")
    assert gpus_here(config) == 1 and with_chosen_mesh(config).mesh_shape == MeshShape()
    with pytest.raises(ConfigurationError, match="leave either out"):
        EngineConfig(parallel="auto", tensor_parallel_size=2)


def planned(capsys: pytest.CaptureFixture, *words: str) -> dict:
    assert main([*words, *JOB, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_machine_that_is_not_here_is_planned_for(capsys):
    """Resident weights: two engines; a model that one GPU's share of the host does not hold: ranks."""
    base = "opt-6.7b", "--gpu", "h200", "--gpus", "2", "--parallel", "auto"
    small = planned(capsys, *base)
    assert (small["engines"], [each["data_parallel_size"] for each in small["meshes"]]) == (2, [2, 1, 1])
    assert [each["pipeline_parallel_size"] for each in small["meshes"]] == [1, 1, 2]
    rates = [each["predicted_tokens_per_second_together"] for each in small["meshes"]]
    assert rates[0] > max(rates[1:]) and small["predicted_tokens_per_second_together"] == pytest.approx(rates[0])
    assert main(["opt-6.7b", "--gpu", "h200", "--parallel", "auto", *JOB]) == 2
    assert "--gpus N" in capsys.readouterr().err


def test_sums_over_gpus_are_in_a_plan(tmp_path, capsys):
    """A slow interconnect makes two ranks slower."""
    machine = load_hardware("h200")
    rank = shared_by(machine, 2, 2)
    assert rank.tensor_ranks == 2 and shared_by(machine, 1) == machine
    rates = {}
    for name, rate in (("fast", 360e9), ("slow", 1e9)):
        path = tmp_path / f"{name}.json"
        path.write_text(dataclasses.replace(machine, interconnect=rate).to_json())
        words = "opt-1.3b", "--gpu", str(path), "--tensor-parallel-size", "2"
        rates[name] = planned(capsys, *words)["predicted_tokens_per_second"]
    assert rates["slow"] < 0.8 * rates["fast"]


def test_launching_sums_is_in_a_plan():
    """Two sums a layer and one of the embedding: in passes that are launched kernel by kernel, not in graphs."""
    machine, shape = load_hardware("h200"), public_shape("llama-3-8b")
    slow = shared_by(dataclasses.replace(machine, interconnect_launch_seconds=1e-4), 2, 2)
    fast, everything = shared_by(machine, 2, 2), Split(1.0, 0.0)
    for batches, sums in ((1, 0), (2, 2 * (2 * 32 + 1))):
        policy = Policy(everything, everything, everything, 64 // batches, batches)
        models = [PassModel(shape, hardware, policy, PassLoad.decode(64, 200)) for hardware in (fast, slow)]
        before, after = (model.launched(point_of(policy)) for model in models)
        assert after - before == pytest.approx(sums * 1e-4)
    one = PassModel(shape, dataclasses.replace(slow, tensor_ranks=1), policy, PassLoad(prompt_tokens=64.0))
    same = PassModel(shape, dataclasses.replace(fast, tensor_ranks=1), policy, PassLoad(prompt_tokens=64.0))
    assert np.all(one.launched(point_of(policy)) == same.launched(point_of(policy))), "one GPU adds up nothing"


def test_host_memory_that_all_links_and_cores_read_is_in_a_plan(tmp_path, capsys):
    """Of its part of the cores each rank has 80 % beside others, and 50 % beside their links, which lose a third."""
    shares = {"cpu_attention_together": 0.8, "cpu_attention_together_during_h2d": 0.5}
    curves = {name: Curve((1.0, 2.0), (1.0, share)) for name, share in shares.items()}
    curves["h2d_together_during_cpu_attention"] = Curve((1.0, 2.0), (1.0, 0.6))
    curves["links_together"] = Curve((1.0, 2.0), (1.0, 0.9))
    machine = load_hardware("h200")
    shared = dataclasses.replace(machine, **curves)
    assert shared_by(shared, 1) == shared
    rank = shared_by(shared, 2)
    for name in ("cpu_attention", "cpu_attention_4", "cpu_experts"):
        assert getattr(rank, name).values[0] == pytest.approx(0.8 / 2 * getattr(machine, name).values[0])
    assert rank.cpu_attention_during_h2d == pytest.approx(0.5 / 2 * machine.cpu_attention_during_h2d)
    assert rank.h2d_during_cpu_attention == pytest.approx(0.6 * machine.h2d_during_cpu_attention)
    assert rank.h2d == pytest.approx(0.9 * machine.h2d) and rank.link_slowdown > 2 * machine.link_slowdown
    rates = []
    for kind, hardware in (("alone", machine), ("shared", shared)):
        path = tmp_path / f"{kind}.json"
        path.write_text(hardware.to_json())
        words = "opt-30b", "--gpu", str(path), "--tensor-parallel-size", "2", "--gpu-memory", "16GiB", *BLOCK
        rates.append(planned(capsys, *words)["predicted_tokens_per_second"])
    assert rates[1] < 0.9 * rates[0]


@pytest.mark.parametrize("name", ["interconnect_send", "links_together"])
def test_what_is_measured_between_gpus_is_in_a_plan(name, tmp_path, capsys):
    """Hidden states over a slow network, and links that share a switch."""
    machine, rates = load_hardware("h200"), {}
    values = {"interconnect_send": (360e9, 1e7), "links_together": (None, Curve((1.0, 2.0), (1.0, 0.4)))}[name]
    for kind, value in zip(("fast", "slow"), values, strict=True):
        path = tmp_path / f"{kind}.json"
        path.write_text(dataclasses.replace(machine, **{name: value}).to_json())
        sizes = ("--pipeline-parallel-size", "2", "--gpu-memory", "6GiB", "--cpu-attention", "0", *BLOCK)
        rates[kind] = planned(capsys, "opt-6.7b", "--gpu", str(path), *sizes)["predicted_tokens_per_second"]
    assert rates["slow"] < 0.8 * rates["fast"]


def test_a_choice_says_why(tmp_path, capsys):
    base = "opt-6.7b", "--gpus", "2", "--parallel", "auto", *JOB
    assert main([*base, "--gpu", "h200", "--gpu-memory", "6GiB"]) == 0
    told = capsys.readouterr().out
    why = r"\n1 x 1 x 2 is \d+% faster than \d x \d x \d: a pass of .*% of it \w+; there a pass of"
    assert re.search(why, told), told
    assert "sums between GPUs at 360 GB/s and 20 us each (published figures)" in told
    machine = dataclasses.replace(load_hardware("h200"), interconnect=0.0)
    (tmp_path / "own.json").write_text(machine.to_json())
    assert main([*base, *BLOCK, "--gpu", str(tmp_path / "own.json")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"sums between GPUs count as copies over the bus \(5\d.* GB/s\): nothing was measured", told)


def test_gpus_are_measured_before_a_mesh_is_chosen(monkeypatch):
    called: list[object] = []
    monkeypatch.setattr(meshes, "gpus_here", lambda config: 2)
    monkeypatch.setattr(meshes.machine, "this_machine", lambda *_, gpus: called.append(gpus))

    class Planned:
        def config(self, config):
            return "chosen"

        def text(self):
            return "table"

    monkeypatch.setattr(Meshes, "planned", lambda *_: called.append("plans") or Planned())
    for hardware, measure, wanted in (("auto", True, [2]), ("h200", True, []), ("auto", False, [])):
        called.clear()
        config = EngineConfig(model="opt-1.3b", dummy_weights=True, parallel="auto", hardware=hardware)
        assert with_chosen_mesh(config, measure=measure) == "chosen" and called == [*wanted, "plans"]
