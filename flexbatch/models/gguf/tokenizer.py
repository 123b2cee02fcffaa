"""The tokenizer and the chat template that a GGUF file holds, made by the converter of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexbatch.models.gguf.header import Length, read_header
from flexbatch.models.gguf.splitting import adds_bos, cut_as_trained
from flexbatch.validation.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
OLDEST = (5, 23)
"""Of transformers: up to 5.17 its converter took the BOS token of a SentencePiece vocabulary for EOS, so that no answer
ended, and up to 5.22 it put no BOS token before a text."""


def load_gguf_tokenizer(path: Path, **options: Any) -> PreTrainedTokenizerBase:
    """With ``options`` of transformers such as ``add_bos_token``. Files that lie beside, such as a tokenizer.json, do
    not count: `from_pretrained` would prefer them, and `AutoTokenizer` takes 25 s for a vocabulary of 49,000.

    Raises CheckpointError.
    """
    metadata = read_header(path).metadata
    count = _checked_count(path, metadata)
    if adds_bos(metadata):
        options = {"add_bos_token": True, **options}
    from transformers import PreTrainedTokenizerFast, __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < OLDEST:
        raise CheckpointError(
            f"{path}: the tokenizer of a GGUF file needs transformers {'.'.join(map(str, OLDEST))} or newer, and "
            f"{__version__} is installed; pip install -U transformers, or name a folder with the model's own by "
            "--tokenizer"
        )

    try:
        tokenizer = PreTrainedTokenizerFast(gguf_file=path.name, name_or_path=str(path.parent), vocab_file=str(path))
        backend = tokenizer.backend_tokenizer
        cut_as_trained(backend, metadata, path)
        more = len(tokenizer) > count
        if options or more:
            kept = {name: getattr(tokenizer, name) for name in (*SPECIAL, "chat_template", "add_bos_token")}
            backend = _without_more(backend, count) if more else backend
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{**kept, **options})
    except BaseException as error:  # a panic of tokenizers, over a vocabulary that contradicts itself, is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} has no tokenizer that transformers can convert: {reason}") from error
    tokenizer.name_or_path = str(path)
    return tokenizer


def _without_more(backend: Tokenizer, count: int) -> Tokenizer:
    """Without the tokens that the converter adds to those of the file: its class for byte-level vocabularies insists on
    <|endoftext|>, which would be a row that the embedding does not have."""
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < count]
    model = content["model"]
    if model.get("unk_token") not in model["vocab"]:
        model["unk_token"] = None
    return type(backend).from_str(json.dumps(content))


def _checked_count(path: Path, metadata: Mapping[str, Any]) -> int:
    """The number of tokens, after a check of what the converter relies on."""
    for key, wanted in (("tokens", Length), ("model", str)):
        if not isinstance(metadata.get(f"tokenizer.ggml.{key}"), wanted):
            raise CheckpointError(f"{path} has no tokenizer: tokenizer.ggml.{key} is missing or of another type")
    parts: dict[str, tuple[str, ...]] = {"gpt2": ("merges",), "llama": ("merges", "scores")}
    needed = parts.get(metadata["tokenizer.ggml.model"], ())
    if needed and not any(metadata.get(f"tokenizer.ggml.{key}") for key in needed):
        raise CheckpointError(f"{path} has no whole tokenizer: tokenizer.ggml.{' or '.join(needed)} is missing")
    count: int = metadata["tokenizer.ggml.tokens"].elements
    for name in ("bos", "eos", "unknown", "padding"):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise CheckpointError(f"{path}: tokenizer.ggml.{name}_token_id={value!r} is no token of {count:,}")
    return count
