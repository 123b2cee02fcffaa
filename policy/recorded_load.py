"""What passes that are graphs, whole or in pieces, compute beside what was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import DECODING_APART

PIECE_KERNELS, APART_KERNELS = 0.5, 0.6
"""What a layer in pieces begins and ends beside one in a graph, of ``graph_seconds``: queries, keys and values are
copied to where attention reads them, and graphs follow each other instead of their kernels; and attention of prompts
behind that of single tokens, where these are many. Pieces of Mistral-7B took an H200 17 us a layer longer than planned
with 13 sequences that decode and 38 with 34 or more, where a layer of a graph had 34."""


@dataclass(frozen=True)
class RecordedLoad:
    """What passes that are graphs compute, of each."""

    tokens: np.ndarray
    """Those that fill them up included."""
    attended: np.ndarray
    """Sequences that are attended, likewise: an empty place attends what the first sequence does."""
    pieces: np.ndarray
    """Whether it runs in pieces."""


def apart(decode_sequences: np.ndarray, prompt_tokens: np.ndarray, batches: int) -> np.ndarray:
    """Whether attention of passes is launched for single tokens and for prompts one after the other, where their cache
    is on the gpu tier."""
    return (decode_sequences / batches >= DECODING_APART) & (prompt_tokens > 0)


def pieced_seconds(hardware: Hardware, pieces: np.ndarray, is_apart: np.ndarray) -> np.ndarray:
    """Of a layer in pieces on the GPU, beside one in a graph."""
    return np.asarray(pieces * (PIECE_KERNELS + APART_KERNELS * is_apart) * hardware.graph_seconds)
