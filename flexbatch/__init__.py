"""FlexBatch: very large batches of prompts through language models that do not fit the GPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flexbatch.kernels import threads

if TYPE_CHECKING:
    from flexbatch.engine import LLM
    from flexbatch.models.lora.request import LoRARequest
    from flexbatch.request import Completion, SamplingParams, StructuredOutputsParams

__all__ = ["LLM", "Completion", "LoRARequest", "SamplingParams", "StructuredOutputsParams"]
__version__ = "0.1.0"

# Here and not in the commands, because it has to precede the import of torch, for those who import this package from
# Python as well.
threads.be_a_good_neighbor(os.environ)


def __getattr__(name: str) -> Any:
    """Import on first use: ``flexbatch.run --help`` must not import torch."""
    if name == "LLM":
        from flexbatch.engine import LLM

        return LLM
    if name in ("Completion", "SamplingParams", "StructuredOutputsParams"):
        from flexbatch import request

        return getattr(request, name)
    if name == "LoRARequest":
        from flexbatch.models.lora.request import LoRARequest

        return LoRARequest
    raise AttributeError(f"module 'flexbatch' has no attribute {name!r}")
