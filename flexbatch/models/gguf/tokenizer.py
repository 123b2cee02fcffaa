"""The tokenizer and the chat template that a GGUF file holds, made by the converter of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexbatch.models.gguf.header import Length, read_header
from flexbatch.validation.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_gguf_tokenizer(path: Path, **options: Any) -> PreTrainedTokenizerBase:
    """With ``options`` of transformers such as ``add_bos_token``. Files that lie beside, such as a tokenizer.json, do
    not count: `from_pretrained` would prefer them, and `AutoTokenizer` takes 25 s for a vocabulary of 49,000.

    Raises CheckpointError.
    """
    _check_metadata(path, read_header(path).metadata)
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(gguf_file=path.name, name_or_path=str(path.parent), vocab_file=str(path))
        if options:
            kept = {name: getattr(tokenizer, name) for name in (*SPECIAL, "chat_template")}
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **{**kept, **options})
    except BaseException as error:  # a panic of tokenizers, over a vocabulary that contradicts itself, is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} has no tokenizer that transformers can convert: {reason}") from error
    tokenizer.name_or_path = str(path)
    return tokenizer


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """What the converter relies on."""
    for key, wanted in (("tokens", Length), ("model", str)):
        if not isinstance(metadata.get(f"tokenizer.ggml.{key}"), wanted):
            raise CheckpointError(f"{path} has no tokenizer: tokenizer.ggml.{key} is missing or of another type")
    count = metadata["tokenizer.ggml.tokens"].elements
    for name in ("bos", "eos", "unknown", "padding"):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise CheckpointError(f"{path}: tokenizer.ggml.{name}_token_id={value!r} is no token of {count:,}")
