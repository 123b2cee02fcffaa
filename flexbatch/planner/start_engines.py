"""Starts the other engines of a job on this host, or meets those that torchrun has started."""

from __future__ import annotations

import dataclasses

import torch

from flexbatch.parallel.channel import open_store
from flexbatch.parallel.links import link_engines
from flexbatch.parallel.mesh import Mesh
from flexbatch.parallel.processes import RankProcesses
from flexbatch.planner import engine_messages as messages
from flexbatch.planner.engine_plan import Deployment
from flexbatch.planner.other_engines import OtherEngines
from flexbatch.validation.errors import ConfigurationError

MODULE = "flexbatch.cli.other_engine"


def open_engines(deployment: Deployment) -> OtherEngines | None:
    """Starts the other engines, or meets those that torchrun has started, and waits until each has looked at what its
    host has free; None for one engine. Raises LostRankError, ConfigurationError."""
    config, links, threads = deployment.config, deployment.group.links, torch.get_num_threads()
    shape, processes = config.mesh_shape, None
    if shape.data == 1:
        return None
    if links is None:
        refuse_too_few_gpus(deployment)
        mesh = Mesh(0, shape.data, "127.0.0.1:0", 0, shape.data, hosts_store=True)
        store = open_store(mesh)
        others = range(1, shape.data)
        address = f"127.0.0.1:{store.port}"
        processes = RankProcesses(MODULE, [Mesh(k, shape.data, address, k, shape.data, False) for k in others])
        found = processes
    try:
        if links is None:
            links = link_engines(mesh, store, list(others), lambda: found.lost)
        engines = OtherEngines(links, processes, threads)
        own_threads = max(1, threads // deployment.group.local_engines)
        for engine, link in engines.links.items():
            one = dataclasses.replace(
                config, data_parallel_size=1, offload_dir=str(deployment.offload_dir / f"engine-{engine}")
            )
            local = engine % deployment.group.local_engines
            link.send(messages.OpenEngine(one, deployment.group.local_engines, local * shape.replica_size, own_threads))
        engines.wait_until_open()
        torch.set_num_threads(own_threads)
        return engines
    except BaseException:
        if processes is not None:
            processes.closing.set()
            processes.kill()
            processes.close()
        raise


def refuse_too_few_gpus(deployment: Deployment) -> None:
    """Raises ConfigurationError."""
    needed, shape = deployment.config.mesh_shape.size, deployment.config.mesh_shape
    if deployment.is_cuda and torch.cuda.device_count() < needed:
        raise ConfigurationError(
            f"{shape.sizes} need {needed} GPUs, and this process sees {torch.cuda.device_count()}: lower one of them, "
            "or start a process for each GPU of several hosts with torchrun"
        )
