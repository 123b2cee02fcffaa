"""Which rank a process is, by what torchrun tells it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.parallel.mesh import Coordinates, Mesh, MeshShape, launched
from flexbatch.parallel.processes import mesh_of_words, mesh_words
from flexbatch.validation.errors import ConfigurationError

RANK_3 = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
FOUR = MeshShape(tensor=4)


def test_a_process_that_nobody_launched_has_no_mesh():
    assert launched({}, FOUR) is None
    assert launched({"RANK": "0", "WORLD_SIZE": "4"}, FOUR) is None, "Slurm alone starts no ranks"
    assert launched({**RANK_3, "RANK": "0", "WORLD_SIZE": "1"}, MeshShape()) is None


def test_torchrun_names_the_rank_and_its_host():
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launched({**RANK_3, **local}, FOUR) == Mesh(3, 4, "node-0:29500", 1, 2, hosts_store=False)
    first = launched({**RANK_3, "RANK": "0"}, FOUR)
    assert first is not None and first.leads and first.hosts_store and first.host_and_port == ("node-0", 29500)
    agent = launched({**RANK_3, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, FOUR)
    assert agent is not None and not agent.hosts_store


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_the_product_is_the_number_of_processes(sizes):
    data, pipeline, tensor = sizes
    named = f"--data-parallel-size {data}, --pipeline-parallel-size {pipeline} and --tensor-parallel-size {tensor}"
    with pytest.raises(ConfigurationError, match=f"4 processes, and the product of {named} is {math.prod(sizes)}"):
        launched(RANK_3, MeshShape(*sizes))


@pytest.mark.parametrize("sizes", [(1, 1, 4), (1, 4, 1), (4, 1, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2)])
def test_four_processes_may_be_any_mesh_of_four(sizes):
    assert launched(RANK_3, MeshShape(*sizes)) is not None


@given(*[st.integers(1, 5)] * 3)
def test_every_rank_has_its_own_coordinates(data, pipeline, tensor):
    shape = MeshShape(data, pipeline, tensor)
    found = [shape.at(rank) for rank in range(shape.size)]
    wanted = [Coordinates(d, p, t) for d in range(data) for p in range(pipeline) for t in range(tensor)]
    assert found == wanted, "tensor ranks are next to each other, replicas farthest apart"


@pytest.mark.parametrize("wrong", [{"RANK": "x"}, {"MASTER_PORT": "y"}, {"RANK": "4"}, {"LOCAL_RANK": "9"}])
def test_variables_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="as torchrun sets them"):
        launched({**RANK_3, **wrong}, FOUR)


def test_a_mesh_goes_through_a_command_line():
    mesh = Mesh(2, 4, "[::1]:29500", 2, 4, hosts_store=False)
    assert mesh_of_words(mesh_words(mesh)) == mesh
    assert mesh.host_and_port == ("[::1]", 29500)
