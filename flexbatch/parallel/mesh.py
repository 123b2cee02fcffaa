"""Which process of several this one is, and where the others are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexbatch.validation.errors import ConfigurationError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands in a mesh: its replica, its stage of layers there, and its part of each of them."""

    data: int
    pipeline: int
    tensor: int


@dataclass(frozen=True)
class MeshShape:
    """Sizes of a mesh: replicas of the model, stages of layers in each, and ranks that share each layer.

    The ranks that share a layer talk most and have consecutive numbers, so that they are on one host; the replicas,
    which hardly talk, are farthest apart.
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if min(self.data, self.pipeline, self.tensor) < 1:
            raise ValueError(f"{self.sizes}: every size of a mesh is at least 1")

    @property
    def size(self) -> int:
        """Processes, and GPUs."""
        return self.data * self.replica_size

    @property
    def replica_size(self) -> int:
        """Ranks that run one model together."""
        return self.pipeline * self.tensor

    @property
    def sizes(self) -> str:
        """For messages, by the flags."""
        return (
            f"--data-parallel-size {self.data}, --pipeline-parallel-size {self.pipeline} and "
            f"--tensor-parallel-size {self.tensor}"
        )

    def at(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} of a mesh of {self.size}")
        return Coordinates(rank // self.replica_size, rank % self.replica_size // self.tensor, rank % self.tensor)


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


def launched(environ: Mapping[str, str], shape: MeshShape) -> Mesh | None:
    """The mesh that torchrun has started this process for, None where it has not. shape: what the flags ask for.
    Raises ConfigurationError where torchrun has started another number of processes."""
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
    if started != shape.size:
        raise ConfigurationError(
            f"torchrun has started {started} processes, and the product of {shape.sizes} is {shape.size}: give both "
            "the same number (with several hosts: --nnodes times --nproc-per-node)"
        )
    return mesh if started > 1 else None
