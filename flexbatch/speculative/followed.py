"""What a draft keeps of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from flexbatch.execution.pass_batch import QueryTokens
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.pages import PageTable


@dataclass
class Followed:
    """What the draft keeps of one sequence. ``cached``: the tokens whose keys and values are in its cache, drafted
    ones at the end."""

    sequence: Sequence
    table: PageTable
    """Its pages in the draft's cache."""
    cached: list[int]
    num_known: int = 0
    """Leading tokens of ``cached`` known to be committed."""

    def query(
        self, token_ids: tuple[int, ...], start: int, first_logit: int, parents: tuple[int, ...] | None = None
    ) -> QueryTokens:
        sequence = self.sequence
        return QueryTokens(
            sequence.sequence_id,
            token_ids,
            start,
            first_logit,
            self.table.location,
            sequence.num_prompt_tokens,
            parents,
        )

    def rewind(self) -> None:
        """Forget what was drafted but not committed. At least the newest token is left to be read: its logits start
        the next tree."""
        tokens = self.sequence.token_ids
        end = min(len(self.cached), len(tokens) - 1)
        keep = next((i for i in range(self.num_known, end) if self.cached[i] != tokens[i]), end)
        del self.cached[keep:]
        self.num_known = keep
