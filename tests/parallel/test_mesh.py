"""Which rank a process is, by what torchrun tells it."""

from __future__ import annotations

import pytest

from flexbatch.parallel.mesh import Mesh, launched
from flexbatch.parallel.processes import mesh_of_words, mesh_words
from flexbatch.validation.errors import ConfigurationError

RANK_3 = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}


def test_a_process_that_nobody_launched_has_no_mesh():
    assert launched({}, 4) is None
    assert launched({"RANK": "0", "WORLD_SIZE": "4"}, 4) is None, "Slurm alone starts no ranks"
    assert launched({**RANK_3, "RANK": "0", "WORLD_SIZE": "1"}, 1) is None


def test_torchrun_names_the_rank_and_its_host():
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launched({**RANK_3, **local}, 4) == Mesh(3, 4, "node-0:29500", 1, 2, hosts_store=False)
    first = launched({**RANK_3, "RANK": "0"}, 4)
    assert first is not None and first.leads and first.hosts_store and first.host_and_port == ("node-0", 29500)
    agent = launched({**RANK_3, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, 4)
    assert agent is not None and not agent.hosts_store


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_product_is_the_number_of_processes(size):
    with pytest.raises(ConfigurationError, match=f"4 processes, and --tensor-parallel-size is {size}"):
        launched(RANK_3, size)


@pytest.mark.parametrize("wrong", [{"RANK": "x"}, {"MASTER_PORT": "y"}, {"RANK": "4"}, {"LOCAL_RANK": "9"}])
def test_variables_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="as torchrun sets them"):
        launched({**RANK_3, **wrong}, 4)


def test_a_mesh_goes_through_a_command_line():
    mesh = Mesh(2, 4, "[::1]:29500", 2, 4, hosts_store=False)
    assert mesh_of_words(mesh_words(mesh)) == mesh
    assert mesh.host_and_port == ("[::1]", 29500)
