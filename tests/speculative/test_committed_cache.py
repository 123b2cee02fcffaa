"""What speculation leaves in the cache."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from flexbatch import SamplingParams
from flexbatch.execution.scheduler import Scheduler
from flexbatch.kernels.reference import unpack_rows
from flexbatch.speculative.tree import TokenTree, TreeShape
from tests.grids import sampled
from tests.speculative.engines import Scripted, continuation, engine, tokens
from tests.tiny_models import VOCAB


def capture(monkeypatch, rows: dict) -> None:
    """Keep every sequence's cached keys and values as it leaves: tokens -> [layers, tokens, 2, num_kv_heads,
    head_dim]."""
    release = Scheduler.release

    def keep(self, sequence) -> None:
        cache, table, layout = self.cache, sequence.table, self.cache.layout
        cache.synchronize()
        found = []
        for layer in range(layout.num_layers):
            if table.tier == "disk":
                pages = torch.zeros(layout.num_pages(table.num_tokens), layout.page_bytes, dtype=torch.uint8)
                cache.disk.read([(table, table.num_tokens)], layer, pages, cache.queues.disk_chunks)
                rows_of_layer = layout.row_view(pages.view(-1))[: table.num_tokens]
            else:
                rows_of_layer = cache.rows(table.tier, layer)[
                    table.location.slots(0, table.num_tokens, layout.page_tokens)
                ]
            values = unpack_rows(
                rows_of_layer, layout.num_kv_heads, layout.head_dim, layout.bits, layout.group, layout.dtype
            )
            found.append(torch.stack(values, dim=1))
        rows[tuple(sequence.token_ids[: table.num_tokens])] = torch.stack(found)
        release(self, sequence)

    monkeypatch.setattr(Scheduler, "release", keep)


CASES = [
    *((placement, {}) for placement in ("cpu", "disk", "mixed", "gpu")),
    *((placement, {"cache_bits": bits}) for placement, bits in (("gpu", 4), ("cpu", 8), ("cpu", 4), ("disk", 4))),
    ("cpu", {"cpu_attention": 1.0}),
    ("cpu", {"cpu_attention": 0.5, "cache_bits": 4}),
]


@pytest.mark.parametrize(("placement", "settings"), sampled(CASES), ids=str)
def test_the_cache_after_commit_equals_a_fresh_prefill(placement, settings, reference, tmp_path, monkeypatch):
    model = reference("llama")
    with engine(model, tmp_path, placement, **settings) as llm:
        model = replace(model, token_ids=tokens(llm, model.prompts))
    kept: dict[tuple[int, ...], torch.Tensor] = {}
    capture(monkeypatch, kept)
    generator = random.Random(1)

    def branching(sequence, depth):
        """The truth behind a wrong sibling at every depth, so that every accepted row has to move."""
        truth = continuation(model, sequence)[: generator.randrange(1, 5)]
        nodes, parents, last = [], [], -1
        for token in truth:
            parents += [last, last]
            nodes += [(token + 1) % VOCAB, token]
            last = len(nodes) - 1
        return TokenTree(tuple(nodes), TreeShape(tuple(parents)))

    with engine(model, tmp_path, placement, draft=("ngram",), tree="best-first:20", **settings) as llm:
        llm.speculator.sources = [Scripted(branching)]
        assert tokens(llm, model.prompts) == model.token_ids
        assert llm.report()["speculation"]["tokens_per_sequence_pass"] > 2
    committed, texts = dict(kept), list(kept)
    kept.clear()
    with engine(model, tmp_path, placement, prefill_chunk=300, **settings) as llm:
        llm.generate([list(text) for text in texts], SamplingParams(max_tokens=1, temperature=0))
    for text in texts:
        if settings.get("cache_bits", 16) == 16:
            torch.testing.assert_close(committed[text], kept[text], rtol=1e-4, atol=1e-4)
        else:
            # Where a value lies halfway between two codes, rounding may go either way. Rows of another token differ
            # nearly everywhere.
            assert ((committed[text] - kept[text]).abs() < 1e-4).float().mean() > 0.99
