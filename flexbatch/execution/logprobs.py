"""Log-probabilities of the model, before any processing, of the tokens that are asked for; and logits in pieces."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from flexbatch.policy.limits import SAMPLING_CHUNK_LOGITS
from flexbatch.request import TokenLogprob


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
    counts = [logits.shape[1] if count < 0 else count for count in counts]
    results: list[dict[int, TokenLogprob]] = []
    for block in chunks(list(range(len(selected))), logits.shape[1]):
        chunk, _ = take(logits, [selected[i] for i in block])
        tokens = torch.tensor([token_ids[i] for i in block], dtype=torch.int64, device=logits.device)[:, None]
        logprobs = chunk.log_softmax(-1)
        own = logprobs.gather(1, tokens)
        ranks = (logprobs > own).sum(-1) + 1
        values, ids = logprobs.topk(min(max(counts[i] for i in block), logits.shape[1]), dim=-1)
        for i, logprob, rank, top_values, top_ids in zip(
            block, own[:, 0].tolist(), ranks.tolist(), values.tolist(), ids.tolist(), strict=True
        ):
            entry = {token_ids[i]: TokenLogprob(token_ids[i], logprob, rank)}
            for rank, (token, value) in enumerate(zip(top_ids[: counts[i]], top_values, strict=False), 1):
                entry.setdefault(token, TokenLogprob(token, value, rank))
            results.append(entry)
    return results


def chunks(rows: list[int], vocab: int) -> list[list[int]]:
    """Rows in pieces of at most SAMPLING_CHUNK_LOGITS logits."""
    size = max(1, SAMPLING_CHUNK_LOGITS // vocab)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def take(logits: Tensor, rows: Many[int]) -> tuple[Tensor, Tensor]:
    """(the rows, their indices as a tensor); without a copy where they are a range of all."""
    index = torch.tensor(rows, dtype=torch.int64, device=logits.device)
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return logits[rows[0] : rows[-1] + 1], index
    return logits[index], index
