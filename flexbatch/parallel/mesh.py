"""Which process of several this one is, and where the others are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexbatch.validation.errors import ConfigurationError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Mesh:
    """The ranks of one engine, a process each. Rank 0 decides and samples; every rank has its part of each layer.

    local_rank, local_size: this rank among those of its host, which share its memory, its disk and its cores.
    """

    rank: int
    size: int
    address: str
    """Host and port of the store at which ranks find each other."""
    local_rank: int
    local_size: int
    hosts_store: bool
    """Whether this rank opens the store. torchrun has one already."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or not 0 <= self.local_rank < self.local_size <= self.size:
            raise ValueError(
                f"rank {self.rank} of {self.size}, number {self.local_rank} of {self.local_size} on its host: a number "
                "must be less than its count"
            )

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host, int(port)


def launched(environ: Mapping[str, str], size: int) -> Mesh | None:
    """The mesh that torchrun has started this process for, None where it has not. size: what --tensor-parallel-size
    asks for. Raises ConfigurationError where torchrun has started another number of processes."""
    found = {name: environ.get(name, "") for name in LAUNCHER_VARIABLES}
    if not all(found.values()):
        return None
    numbers = {name: environ.get(name, found[name[6:]]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    try:
        rank, started, port = int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["MASTER_PORT"])
        local_rank, local_size = int(numbers["LOCAL_RANK"]), int(numbers["LOCAL_WORLD_SIZE"])
        hosts_store = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() != "true"
        mesh = Mesh(rank, started, f"{found['MASTER_ADDR']}:{port}", local_rank, local_size, hosts_store)
    except ValueError as error:
        raise ConfigurationError(f"{', '.join(LAUNCHER_VARIABLES)}, as torchrun sets them: {error}") from error
    if started != size:
        raise ConfigurationError(
            f"torchrun has started {started} processes, and --tensor-parallel-size is {size}: give both the same "
            "number (with several hosts: --nnodes times --nproc-per-node)"
        )
    return mesh if size > 1 else None
