"""What the tests ask of a token tree and the engine does not."""

from __future__ import annotations

import numpy as np

from flexbatch.execution.inputs import ancestor_masks
from flexbatch.speculative.tree import ROOT, TokenTree, TreeShape


def path_tokens(tree: TokenTree, node: int) -> tuple[int, ...]:
    """Tokens from below the root down to ``node``; () for ROOT."""
    return tuple(tree.token_ids[i] for i in tree.shape.path(node))


def query_masks(shape: TreeShape) -> np.ndarray:
    """int32 [n + 1, ceil((n + 1) / 32)]: ancestor masks of the query tokens, root included."""
    return ancestor_masks((ROOT, *(parent + 1 for parent in shape.parents)))
