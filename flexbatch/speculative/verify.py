"""From the target's distribution at every node to the accepted path and one more token, without changing the target's
distribution.

The rule depends on how the tree was drawn; a wrong pairing is silently biased (multi-step sampling on top-k children:
total variation about 0.3).
- deterministic: draw from the target, follow the child that matches (`QueryTokens.follow`, when a batch of rows is
  drawn at once). The path is exactly what
  plain decoding would have drawn, for *any* tree, also one that depends on the noise the target draws with.
- independent: multi-step speculative sampling (Miao et al., "SpecInfer", ASPLOS 2024, Algorithm 2).
- without replacement: the residual rule in draw order, the draft renormalized after each rejection (Chen et al.,
  "Sequoia", 2024, Algorithm 1). Chance enters through `Draws` alone, so that a test can run these very functions
  over every outcome and add up exact probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexbatch.speculative.tree import Drawing, TokenTree

UNDRAWN = -1
"""It stands for the one more token where the target has no probabilities (`sampling.NOT_FINITE`): the caller tells this
from what is barred."""


class Draws(Protocol):
    """The random stream of one request. ``depth`` counts from the next output token (0): the same position never serves
    two decisions."""

    def accept(self, depth: int, rank: int, probability: float) -> bool:
        """True with the given probability: is the child of this rank accepted as output token ``depth``."""

    def token(self, depth: int, probabilities: Tensor) -> int:
        """A token drawn from ``probabilities`` [vocab] as output token ``depth``."""


@dataclass(frozen=True)
class AcceptedPath:
    """path: accepted nodes from the root down. token: the one more token that follows them; it has no keys and
    values yet."""

    path: tuple[int, ...]
    token: int

    def tokens(self, tree: TokenTree) -> tuple[int, ...]:
        """All tokens that this path emits."""
        return (*(tree.token_ids[node] for node in self.path), self.token)


def verify(tree: TokenTree, target: Tensor, draws: Draws, draft: Sequence[Tensor] | None = None) -> AcceptedPath:
    """The accepted path and one more token, by the rule that fits ``tree.drawn``.

    target: [len(tree) + 1, vocab] probabilities at every query row, temperature, top-k, top-p and penalties applied.
    draft: for every node the probabilities [vocab] of the draft at its parent, before anything was drawn there
    (siblings share one tensor); not used for deterministic trees. Raises ValueError when ``draft`` is missing, or
    gives no probability to a node that it is said to have drawn.
    """
    if target.shape[0] != len(tree) + 1:
        raise ValueError(
            f"{target.shape[0]} target distributions for a tree of {len(tree)} nodes: need {len(tree) + 1}, the "
            "root's first"
        )
    if tree.drawn is not Drawing.DETERMINISTIC and len(tree) and (draft is None or len(draft) != len(tree)):
        raise ValueError(
            f"a tree drawn {tree.drawn.value} needs the draft's distribution of each of its {len(tree)} nodes"
        )
    path: list[int] = []
    row = 0
    drawable = target.sum(-1).isfinite().tolist()
    while True:
        if not drawable[row]:
            return AcceptedPath(tuple(path), UNDRAWN)
        children = tree.shape.children[row]
        node: int | None
        if tree.drawn is Drawing.DETERMINISTIC or draft is None or not children:
            token = draws.token(len(path), target[row])
            node = tree.child(row, token)
        else:
            accept, residual = rejection(
                tree.drawn,
                target[row],
                [tree.token_ids[child] for child in children],
                [draft[child] for child in children],
            )
            node = next(
                (child for rank, child in enumerate(children) if draws.accept(len(path), rank, accept[rank])), None
            )
            token = draws.token(len(path), residual) if node is None else tree.token_ids[node]
        if node is None:
            return AcceptedPath(tuple(path), token)
        path.append(node)
        row = node + 1


def rejection(
    drawn: Drawing, target: Tensor, tokens: Sequence[int], draft: Sequence[Tensor]
) -> tuple[list[float], Tensor]:
    """Chances at one node: for every child, in draw order, the probability to accept it once those before were
    rejected; and what to draw from when all are, [vocab] float64.

    target: [vocab]. tokens: the children. draft[j]: [vocab], what child j was drawn from (for WITHOUT_REPLACEMENT:
    before the first draw).
    """
    p = target.to(torch.float64)
    taken: list[int] = []
    ratios: list[Tensor] = []
    for token, source in zip(tokens, draft, strict=True):
        q = source.to(torch.float64)
        if drawn is Drawing.WITHOUT_REPLACEMENT and taken:
            q = q.clone()
            q[taken] = 0.0
        q = q / q.sum()
        ratios.append(p[token] / q[token])
        p = _residual(p, q)
        taken.append(token)
    accept = torch.stack(ratios).tolist()
    for token, probability in zip(tokens, accept, strict=True):
        if not probability < float("inf"):
            raise ValueError(f"token {token} cannot have been drawn {drawn.value}: the draft gives it no probability")
    return [min(1.0, probability) for probability in accept], p


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), normalized. Where q covers p the child is always accepted and p stays, never to be drawn from."""
    excess = (p - q).clamp_(min=0.0)
    mass = excess.sum()
    return torch.where(mass > 0, excess / mass, p)
