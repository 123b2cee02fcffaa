"""A bar on stderr for those who ask `LLM.generate` for one by ``use_tqdm``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from flexbatch.request import Completion

OnFinished = Callable[[Completion], None]


@contextlib.contextmanager
def finished_bar(
    use_tqdm: bool | Callable[..., Any], total: int, also: OnFinished | None
) -> Iterator[OnFinished | None]:
    """Gives what is to be told of every completion: the bar, and ``also``. use_tqdm: False for no bar, or a class that
    stands in for tqdm, as in vLLM."""
    if not use_tqdm:
        yield also
        return
    from tqdm.auto import tqdm

    bar = (use_tqdm if callable(use_tqdm) else tqdm)(total=total, desc="Processed prompts", dynamic_ncols=True)
    tokens = 0

    def finished(completion: Completion) -> None:
        nonlocal tokens
        tokens += len(completion.token_ids)
        bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
        bar.update(1)
        if also is not None:
            also(completion)

    try:
        yield finished
    finally:
        bar.close()
