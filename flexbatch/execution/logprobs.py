"""Log-probabilities of the model, before any processing, of the tokens that are asked for; and logits in pieces."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from flexbatch.execution.copies import Readback, sent
from flexbatch.policy.limits import SAMPLING_CHUNK_LOGITS
from flexbatch.request import TokenLogprob


class Scored:
    """Log-probabilities on their way to the host."""

    def __init__(self, logits: Tensor, token_ids: Tensor, counts: Many[int], rows: Many[int]) -> None:
        """token_ids: [len(rows)] int64 on the device of the logits, negative where a row has none. See
        `token_logprobs`."""
        vocab = logits.shape[1]
        self._counts = [vocab if count < 0 else count for count in counts]
        self._pieces: list[tuple[list[int], Readback]] = []
        for block in chunks(list(range(len(rows))), vocab):
            chunk, _ = take(logits, [rows[i] for i in block])
            tokens = token_ids[block[0] : block[-1] + 1]
            logprobs = chunk.log_softmax(-1)
            own = logprobs.gather(1, tokens.clamp(min=0)[:, None])
            ranks = (logprobs > own).sum(-1) + 1
            values, ids = logprobs.topk(min(max(self._counts[i] for i in block), vocab), dim=-1)
            self._pieces.append((block, Readback(tokens, own[:, 0], ranks, values, ids)))

    def read(self) -> list[dict[int, TokenLogprob] | None]:
        """One entry for every row; None for one without a token."""
        results: list[dict[int, TokenLogprob] | None] = []
        for block, readback in self._pieces:
            columns = (column.tolist() for column in readback.take())
            for i, token_id, logprob, rank, top_values, top_ids in zip(block, *columns, strict=True):
                if token_id < 0:
                    results.append(None)
                    continue
                entry = {token_id: TokenLogprob(token_id, logprob, rank)}
                top = zip(top_ids[: self._counts[i]], top_values, strict=False)
                for rank, (token, value) in enumerate(top, 1):
                    entry.setdefault(token, TokenLogprob(token, value, rank))
                results.append(entry)
        return results


def token_logprobs(
    logits: Tensor, token_ids: Many[int], counts: Many[int], rows: Many[int] | None = None
) -> list[dict[int, TokenLogprob]]:
    """The log-probability of `token_ids[i]` and of the counts[i] most likely tokens (-1: of all), given the unprocessed
    logits of its row.

    logits: [N, vocab] float32; `rows` picks the rows (default: all). The given token comes first in each dict, then
    by rank. Serves generated tokens and, a block of rows at a time, the tokens of a prompt: row i's logits predict
    token i + 1 of the prompt.
    """
    selected = list(range(logits.shape[0])) if rows is None else list(rows)
    if not len(selected) == len(token_ids) == len(counts):
        raise ValueError(
            f"{len(selected)} rows, {len(token_ids)} tokens, {len(counts)} counts: need one of each per row"
        )
    scored = Scored(logits, sent(token_ids, torch.int64, logits.device), counts, selected)
    return [entry for entry in scored.read() if entry is not None]


def chunks(rows: list[int], vocab: int) -> list[list[int]]:
    """Rows in pieces of at most SAMPLING_CHUNK_LOGITS logits."""
    size = max(1, SAMPLING_CHUNK_LOGITS // vocab)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def take(logits: Tensor, rows: Many[int]) -> tuple[Tensor, Tensor]:
    """(the rows, their indices as a tensor); without a copy where they are a range of all."""
    index = sent(rows, torch.int64, logits.device)
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return logits[rows[0] : rows[-1] + 1], index
    return logits.index_select(0, index), index
