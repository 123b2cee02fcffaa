"""Prompts that a run makes up."""

from __future__ import annotations

import random


def synthetic_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` different prompts of `length` random token ids, the same ones for the same arguments."""
    return [random.Random(f"{seed} {index}").choices(range(vocab_size), k=length) for index in range(count)]
