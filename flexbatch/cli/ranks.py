"""Commands that torchrun starts on every GPU: rank 0 runs the command, the others follow it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from flexbatch.parallel.mesh import MeshShape, launched
from flexbatch.validation.errors import DONE, LostRankError

if TYPE_CHECKING:
    from flexbatch.parallel.channel import RankChannel


def run_on_ranks(
    environ: Mapping[str, str], shape: MeshShape, command: Callable[[RankChannel | None], int], dry: bool = False
) -> int:
    """Returns the exit code of this process. command: what rank 0 runs, given the way to the others, or None where
    torchrun has started none. shape: what the flags ask for. dry: no engine is opened, and rank 0 needs no others.
    Raises ConfigurationError."""
    mesh = launched(environ, shape)
    if mesh is None:
        return command(None)
    if dry:
        return command(None) if mesh.leads else DONE
    from flexbatch.parallel.channel import RankChannel, open_store

    channel = RankChannel(mesh, open_store(mesh))
    if not mesh.leads:
        from flexbatch.planner.follower import follow_launched

        return follow_launched(channel)
    from flexbatch.planner.rank_commands import Leave

    code = command(channel)
    if not channel.broken:
        with contextlib.suppress(LostRankError):
            channel.send(Leave())
    return code
