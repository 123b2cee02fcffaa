"""The parts of a job that workers of a cluster take: who holds which, and what a worker that died leaves behind."""

from __future__ import annotations

import dataclasses
from collections import deque
from pathlib import Path

from flexbatch.apps.jobs.commits import identity, read_commits
from flexbatch.apps.jobs.journal import Journal
from flexbatch.apps.jobs.manifest import STATE
from flexbatch.apps.jobs.plan import BatchJob
from flexbatch.apps.jobs.preview import Preview
from flexbatch.apps.jobs.results import RowRecord


class PartQueue:
    """Hands out the parts of a job to workers, one at a time and in order. It is a Ray actor, so that all workers see
    the same list.

    ``parts``: number -> records of rows that are finished; ``seen`` is for the workers' planners, ``grant`` is the
    driver's, in whose name they write. What a worker held when it died goes to the front again, with what its journal
    holds. Every hand-out has a number of its own, so that what a worker still records that was only thought dead counts
    as older than what its successor does.
    """

    def __init__(
        self,
        job: BatchJob,
        digest: bytes,
        parts: dict[int, dict[int, RowRecord]],
        seen: Preview | None = None,
        grant: Path | None = None,
    ) -> None:
        self._job, self._digest, self._finished, self._seen, self._grant = job, digest, parts, seen, grant
        self._leases = 0
        self._waiting = deque(parts)
        self._held: dict[int, set[int]] = {}
        self._commits: list[dict[str, int]] = []
        self._done: set[int] = set()
        self._stopped = False

    def job(self) -> tuple[BatchJob, Preview | None, Path | None]:
        """Returns what the workers need. A restarted actor cannot count on large arguments of its own, which Ray may
        have lost with their node."""
        return self._job, self._seen, self._grant

    def register(self, worker: int) -> None:
        """Registers a worker that begins, perhaps again."""
        lost = self._held.pop(worker, set())
        self._held[worker] = set()
        if not lost:
            return
        job, config = self._job, self._job.config
        retry = config.retry_failed or config.retry_truncated is not None
        state = Path(job.folder).expanduser() / STATE
        if not retry:
            known = read_commits(state, self._digest)
            for number in sorted(lost):
                found = identity(state.parent / job.parts[number].file_name(job.output.suffix))
                if found is not None and (commit := known.get(number, {}).get(found)) is not None:
                    self._add(dataclasses.asdict(commit[0]))
                    lost.discard(number)
        for number, records in Journal(state, "part-queue", self._digest).recover(lost.__contains__).items():
            # What was finished before has not been given out: a journal can only have older records of those rows.
            self._finished[number] = {
                **{row: record for row, record in records.items() if not job.runs_again(record)},
                **self._finished[number],
            }
        self._waiting.extendleft(sorted(lost, reverse=True))

    def take(self, worker: int) -> tuple[int, dict[int, RowRecord], int] | None:
        """Returns the next part, its finished rows and the number of this hand-out; None when there is none, or no
        more are wanted."""
        if self._stopped or not self._waiting:
            return None
        part = self._waiting.popleft()
        self._held[worker].add(part)
        self._leases += 1
        return part, self._finished[part], self._leases

    def done(self, worker: int, commit: dict[str, int]) -> None:
        self._held[worker].discard(commit["part"])
        self._add(commit)

    def _add(self, commit: dict[str, int]) -> None:
        """Adds a commit once: a worker that was only thought dead may report a part twice."""
        if commit["part"] not in self._done:
            self._done.add(commit["part"])
            self._commits.append(commit)

    def stop(self) -> None:
        """Hands out no more parts: workers finish the sequences that they have in flight."""
        self._stopped = True

    def stopped(self) -> bool:
        return self._stopped

    def take_commits(self) -> list[dict[str, int]]:
        """Returns what was committed since the last call."""
        commits, self._commits = self._commits, []
        return commits
