"""What the batcher asks of speculation: query tokens before a pass, a verdict after it, and to be told what was committed.

Speculation is a source of query tokens. The batcher depends on the shape of this protocol alone; without a proposer every sequence has the empty
tree, whose verdict is one token, so that plain decoding is the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from flexbatch.execution.request_state import RequestState
from flexbatch.speculative.tree import TokenTree
from flexbatch.speculative.verify import Verdict


class Proposer(Protocol):
    """Calls come as propose, verify, observe, for the same sequences in the same order, once per pass."""

    def propose(self, states: Sequence[RequestState], max_depths: Sequence[int], *, other_query_tokens: int) -> list[TokenTree]:
        """One tree per sequence that decodes in the coming pass, possibly empty.

        max_depths: longest path that the sequence may commit besides the one more token (what max_tokens and the context leave). other_query_tokens:
        prompt tokens that ride in the pass. Called while the first layers of the target are already being fetched.
        """

    def verify(self, states: Sequence[RequestState], trees: Sequence[TokenTree], logits: Tensor) -> list[Verdict]:
        """logits: [sum of len(tree) + 1, vocab] float32, of all query rows of all trees, the root's first. Deterministic in the requests' streams."""

    def observe(self, states: Sequence[RequestState], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], pass_seconds: float) -> None:
        """The verdicts as committed (``states`` hold the new tokens): a path that EOS, a stop string or max_tokens cut is given cut.

        pass_seconds: measured time of the target's pass, without the drafting.
        """

    def retire(self, state: RequestState) -> None:
        """The sequence left the block: free what is kept for it. Also called for sequences that were never proposed for."""

    def report(self) -> dict[str, object]:
        """Acceptance by position, tokens per pass, share of time spent drafting; measured in this run."""

    def check(self) -> None:
        """Raises AssertionError when caches and sequences do not agree."""
