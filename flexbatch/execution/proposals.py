"""What the scheduler asks of speculation: token trees before a pass, their verification, and to be told what was
committed.

Speculation is a source of query tokens; nothing here knows where trees come from. Without a proposer every sequence
brings its last token alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Protocol

from torch import Tensor

from flexbatch.execution.pass_batch import QueryTokens
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.sequence import Sequence


class Tree(Protocol):
    """Drafted continuations of a sequence."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """One per node."""

    @property
    def parents(self) -> tuple[int, ...]:
        """Index of the node that each node continues, -1 for the last committed token; parents come before children."""


class Proposer(Protocol):
    """Called as propose, verify, observe, once per pass, and release for every sequence that leaves the block. Passes
    of a pipeline are in flight together: observed in the order in which they were proposed for."""

    @property
    def max_nodes(self) -> int:
        """Nodes of the largest tree: rows that a sequence's cache has beyond its tokens."""

    def propose(self, sequences: Many[Sequence], max_depths: Many[int], other_query_tokens: int) -> Many[Tree]:
        """A tree for every sequence that decodes in the coming pass (there may be none); the empty tree is plain
        decoding.

        max_depths: longest path worth drafting, given that one more token follows it. other_query_tokens: prompt
        tokens that ride in the pass. Called while the first layers' weights of the pass are on their way.
        """

    def needs_verification(self, query: QueryTokens) -> bool:
        """Whether `verify` decides about this tree. Otherwise `follow` does."""

    def verify(self, query: QueryTokens, logits: Tensor) -> SampledTokens:
        """The accepted path and its tokens. logits: [query.num_tokens, vocab] float32."""

    def follow(self, query: QueryTokens, sampled: SampledTokens) -> SampledTokens:
        """The path of a tree, given the token that plain decoding would draw after each of its query tokens."""

    def observe(self, results: Mapping[int, SampledTokens]) -> None:
        """What the pass gave every sequence that drew tokens, by sequence id, before EOS, a stop string or a limit
        cuts their paths. Prompts just read are among them."""

    def release(self, sequence: Sequence) -> None:
        """The sequence has left the block. Also called for sequences never proposed for."""

    def forget(self) -> None:
        """Let go of all sequences, after a run that failed half-way."""
