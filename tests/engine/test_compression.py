"""What compression costs the demo model, on a little of the text that its table is made from."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmark import compression
from benchmark.compression import CONTEXT, GOAL_PERCENT, Cell, held_out_text, table
from flexbatch.models import resolve

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(resolve.resolve("demo") / "tokenizer.json"))


def test_windows_score_every_held_out_token_once(tokenizer):
    text = held_out_text(STDLIB, tokenizer, None)
    assert text.scored_tokens == text.num_tokens - 1 and text.files > 10
    assert all(before[-1] == window[0] for before, window in zip(text.windows, text.windows[1:], strict=False))
    part = held_out_text(STDLIB, tokenizer, 5 * CONTEXT)
    assert part.scored_tokens == 5 * CONTEXT and part.tokens_per_byte == text.tokens_per_byte
    assert all(window in text.windows for window in part.windows)


def test_table_has_weights_down_and_cache_across():
    cells = [
        Cell("", 16, 16, 0.5, 0.0, 1.0),
        Cell("", 4, 16, 0.505, 1.0, 1.0),
        Cell("", 16, 4, 0.51, 2.0, 1.0),
        Cell("other", 4, 16, 0.6, 20.0, 1.0),
    ]
    lines = table(cells).splitlines()
    assert (
        lines[2] == "| 16 bits | 0.5000 (+0.00 %) |  | 0.5100 (+2.00 %) |"
        and lines[4] == "| 4 bits | 0.5050 (+1.00 %) |  |  |"
    )
    assert lines[-1] == "| other | 0.6000 | +20.00 % |"


@pytest.mark.slow
def test_four_bits_of_both_cost_less_than_the_goal(tokenizer, monkeypatch):
    """A minute or two: 32,768 tokens at 16 bits, and at 8 and 4 bits of both. Half as many differ too much from the
    whole: 16,384 gave 2.06 %."""
    monkeypatch.setattr(compression, "PLAIN", [("", bits, bits, {}) for bits in (16, 8, 4)])
    monkeypatch.setattr(compression, "VARIANTS", ())
    cells = compression.measure(
        held_out_text(STDLIB, tokenizer, 16 * CONTEXT), {"device": "cpu", "gpu_batch_size": 4, "num_gpu_batches": 1}
    )
    assert abs(cells[1].added_percent) < 0.1 and 0 < cells[2].added_percent < GOAL_PERCENT
