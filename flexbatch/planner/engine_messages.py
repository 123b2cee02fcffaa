"""What rank 0 and the other engines of a job tell each other: plain data. `run` is the number of a run of rank 0: what
belongs to an earlier one is passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.execution.watch import PassSeen, SequenceSeen
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.policy import Policy
from flexbatch.request import Completion, Request

# From rank 0 to an engine


@dataclass(frozen=True)
class OpenEngine:
    """Open an engine. local_engines: on its host, which share memory, disk and cores. first_gpu: of those that the
    process sees; its engine has as many from there on as it has ranks."""

    config: EngineConfig
    local_engines: int
    first_gpu: int
    threads: int


@dataclass(frozen=True)
class RunPlan:
    """What an engine plans by: the job that it may expect to get, or with ``exactly`` false one like it; the part of
    the machine that rank 0 plans with, None where it needed none; and the policy there, whose bits are for all."""

    job: Job
    exactly: bool
    hardware: Hardware | None
    policy: Policy


@dataclass(frozen=True)
class Prepare:
    """Make room for a job, and answer when that is done."""

    plan: RunPlan


@dataclass(frozen=True)
class PlaceFor:
    """Bring the weights to their tiers for a job."""

    plan: RunPlan


@dataclass(frozen=True)
class BeginRun:
    """Take requests from now on."""

    run: int
    plan: RunPlan


@dataclass(frozen=True)
class Share:
    """The answer to `Want`; without requests nobody waits who is for this engine."""

    run: int
    requests: Sequence[Request]


@dataclass(frozen=True)
class More:
    """Somebody waits again."""


@dataclass(frozen=True)
class GiveBack:
    """Return what has not begun."""


@dataclass(frozen=True)
class Drop:
    """Nobody waits any more for the prompts of these indices."""

    indices: frozenset[int]


@dataclass(frozen=True)
class EndRun:
    """Release what is in flight."""


@dataclass(frozen=True)
class AskReport:
    """What was measured so far."""


@dataclass(frozen=True)
class EndEngine:
    """Nothing else comes."""


# From an engine to rank 0


@dataclass(frozen=True)
class Opened:
    """The engine knows its part of the host. No engine takes anything before all have looked at what is free."""


@dataclass(frozen=True)
class Prepared:
    """The answer to `Prepare`."""


@dataclass(frozen=True)
class Want:
    """The engine has free slots, of so many in its block, and nobody who waits for them."""

    run: int
    free: int
    slots: int


@dataclass(frozen=True)
class Ended:
    """A request that has ended. refused: no block holds it."""

    index: int
    sample: int
    completion: Completion
    refused: bool


@dataclass(frozen=True)
class Finished:
    run: int
    ended: Sequence[Ended]


@dataclass(frozen=True)
class Returned:
    """The answer to `GiveBack`."""

    run: int
    requests: Sequence[Request]


@dataclass(frozen=True)
class SeenElsewhere:
    """What a pass did, or a sequence that has ended."""

    what: PassSeen | SequenceSeen


@dataclass(frozen=True)
class Reported:
    """The answer to `AskReport`."""

    report: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """The engine ends; its log has the traceback."""

    error: str
