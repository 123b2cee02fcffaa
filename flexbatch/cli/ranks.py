"""Commands that torchrun starts on every GPU: rank 0 runs the command, the others follow it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexbatch.parallel.mesh import Mesh, MeshShape, launched
from flexbatch.validation.errors import DONE, ConfigurationError, LostRankError

if TYPE_CHECKING:
    from torch.distributed import Store

    from flexbatch.parallel.channel import RankChannel
    from flexbatch.parallel.links import EngineGroup


@dataclass(frozen=True)
class Elsewhere:
    """The way from rank 0 to the other ranks of its engine, and to the other engines, where torchrun has started
    them."""

    channel: RankChannel | None = None
    group: EngineGroup | None = None


ALONE = Elsewhere()
"""Nobody has started others."""


def run_on_ranks(
    environ: Mapping[str, str], shape: MeshShape, command: Callable[[Elsewhere], int], dry: bool = False
) -> int:
    """Returns the exit code of this process. command: what rank 0 runs. shape: what the flags ask for. dry: no engine
    is opened, and rank 0 needs no others. Raises ConfigurationError."""
    mesh = launched(environ, shape)
    if mesh is None:
        return command(ALONE)
    if dry:
        return command(ALONE) if mesh.leads else DONE
    from flexbatch.parallel.channel import RankChannel, open_store

    own = mesh_of_engine(mesh, shape)
    store = open_store(mesh)
    engine = shape.at(mesh.rank).data
    channel = None
    if own.size > 1:
        if engine:
            from flexbatch.cli.other_engine import use_gpus

            use_gpus(mesh.local_rank - own.local_rank, own.local_size)
        channel = RankChannel(own, store_of_engine(store, engine) if shape.data > 1 else store)
    if not own.leads:
        from flexbatch.planner.follower import follow_launched

        assert channel is not None
        return follow_launched(channel)
    if engine:
        return run_other_engine(mesh, store, engine, channel)
    code = command(Elsewhere(channel, engines_of(mesh, shape, store)))
    leave(channel)
    return code


def mesh_of_engine(mesh: Mesh, shape: MeshShape) -> Mesh:
    """The ranks of the engine that a rank belongs to. Raises ConfigurationError where a host ends in its middle."""
    size = shape.replica_size
    if shape.data == 1:
        return mesh
    if size > 1 and mesh.local_size % size and size % mesh.local_size:
        raise ConfigurationError(
            f"torchrun has started {mesh.local_size} processes on this host, which are no whole number of engines of "
            f"{size} ranks: start a multiple of {size} (--nproc-per-node)"
        )
    local_size = min(size, mesh.local_size)
    return Mesh(mesh.rank % size, size, mesh.address, mesh.local_rank % local_size, local_size, hosts_store=False)


def store_of_engine(store: Store, engine: int) -> Store:
    from torch.distributed import PrefixStore

    return PrefixStore(f"engine {engine}", store)


def engines_of(mesh: Mesh, shape: MeshShape, store: Store) -> EngineGroup | None:
    """On rank 0: the way to the other engines; None for one engine. Raises LostRankError."""
    if shape.data == 1:
        return None
    from flexbatch.parallel.links import EngineGroup, link_engines

    links = link_engines(mesh, store, list(range(1, shape.data)))
    return EngineGroup(engines_here(mesh, shape), links)


def engines_here(mesh: Mesh, shape: MeshShape) -> int:
    return max(1, mesh.local_size // shape.replica_size)


def run_other_engine(mesh: Mesh, store: Store, engine: int, channel: RankChannel | None) -> int:
    """The first rank of another engine than rank 0's."""
    from flexbatch.cli.other_engine import run_engine
    from flexbatch.parallel.links import link_to_rank_0
    from flexbatch.parallel.processes import ignore_interruptions

    ignore_interruptions()
    code = run_engine(link_to_rank_0(mesh, store, engine), engine, channel)
    leave(channel)
    return code


def leave(channel: RankChannel | None) -> None:
    """Have the other ranks of this engine end."""
    from flexbatch.planner.rank_commands import Leave

    if channel is not None and not channel.broken:
        with contextlib.suppress(LostRankError):
            channel.send(Leave())
