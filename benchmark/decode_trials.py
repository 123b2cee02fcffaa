"""Launches of attention of single tokens over 16-bit caches, from many short contexts to a few long ones."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

from benchmark.kernel_cases import Row, attention_call
from benchmark.kernel_trials import Trial, difference
from flexbatch.kernels import attention, attention_reference

CASES = {  # sequences, least and most tokens of a context
    "Llama-3-8B shape, 1,000 x 100 to 500": (1000, 100, 500),
    "Llama-3-8B shape, 1,000 x 40 to 250": (1000, 40, 250),
    "Llama-3-8B shape, 64 x 100 to 500": (64, 100, 500),
    "Llama-3-8B shape, 64 x 4096": (64, 4096, 4096),
    "Llama-3-8B shape, 8 x 16384": (8, 16384, 16384),
}
LAUNCHES = [  # query rows, keys, warps, stages
    *((16, 64, 4, stages) for stages in (3, 2, 4, 5)),
    *((16, 32, warps, 3) for warps in (4, 2, 1)),
    (16, 64, 2, 3),
    (16, 64, 8, 3),
    *((16, 128, warps, 3) for warps in (4, 8)),
]


def short_trials() -> Iterator[Trial]:
    """Rates count the bytes of keys and values that are read."""
    for name, (count, least, most) in CASES.items():
        draw = random.Random(0)
        contexts = [most, *(draw.randint(least, most) for _ in range(count - 1))]
        call, options = attention_call([1] * count, contexts, 32, 8, 128)
        num_bytes = sum(contexts) * call[1][0].numel() * call[1].element_size()
        wanted = attention_reference.paged_attention(*call, **options)

        def rate(took: float, num_bytes: int = num_bytes) -> Row:
            return {"gbps": num_bytes / took / 1e9}

        for launch in (None, *LAUNCHES):
            shape = None if launch is None else attention.AttentionLaunch(*launch)
            work = functools.partial(attention.paged_attention, *call, **options, launch=shape)
            row = {"kernel": "decode", "case": name, "bits": 16, "launch": launch or "engine's"}
            yield Trial(row, work, difference(wanted), rate)
