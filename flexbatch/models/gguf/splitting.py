"""How a text is cut before it becomes tokens of a GGUF file, where the converter of transformers leaves it open.

A file names its way in ``tokenizer.ggml.pre``. For a name that it does not know the converter cuts as GPT-2 does, and
says nothing: then the digits of a number stay together, or a blank line before a list becomes other tokens than the
model was trained with. The rows here are those of the models' own tokenizers, under the names of llama.cpp.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Punctuation, Split

logger = logging.getLogger("flexbatch")

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Llama 3's; the place that is left is for digits."""
SENTENCES = " ?[^(\\s|.,!?…。，、।۔،)]+"
"""Bloom's."""


def _isolated(*patterns: str) -> list[PreTokenizer]:
    return [Split(Regex(pattern), behavior="isolated") for pattern in patterns]


BYTES, GPT2 = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = Digits(individual_digits=True)
KINDS: dict[tuple[str, ...], list[PreTokenizer]] = {
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): [DIGITS, GPT2],
    ("falcon",): [
        Punctuation(behavior="contiguous"),
        GPT2,
        Digits(individual_digits=False),
        *_isolated("[0-9][0-9][0-9]"),
    ],
    ("bloom", "gpt3-finnish", "poro-chat"): [*_isolated(SENTENCES), BYTES],
    ("viking",): [*_isolated(SENTENCES), DIGITS, BYTES],
    ("glm4", "chatglm-bpe"): [*_isolated(WORDS % r"\p{N}{1,3}"), BYTES],
    ("stablelm2",): [*_isolated(WORDS % r"\p{N}"), BYTES],
    ("deepseek-coder",): [
        *_isolated(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"),
        DIGITS,
        BYTES,
    ],
}
SPLITS = {name: pre_tokenizers.Sequence(parts) for names, parts in KINDS.items() for name in names}
LIKE_GPT2 = frozenset(
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "mellum", "a.x-4.0", "granite-docling")
)
OF_GPT2 = frozenset(("gpt2", "gptneox", "phi2", "olmoe"))
"""Architectures whose models all do, so that nothing is unclear where a file names no way."""
WHOLE = frozenset(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"))
"""Where a word that is a token is taken whole, whatever its merges say; and a text begins with BOS unless the file says
otherwise, as files of 2024 do not."""


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a text begins with BOS although the file does not say so."""
    return "tokenizer.ggml.add_bos_token" not in metadata and _way(metadata) in WHOLE


def cut_as_trained(backend: Tokenizer, metadata: Mapping[str, Any], path: Path) -> None:
    """Change what the converter made so that it cuts texts as the file says; a way that is not known is warned of."""
    model, way = metadata.get("tokenizer.ggml.model"), _way(metadata)
    if model == "gpt2":
        if isinstance(backend.pre_tokenizer, ByteLevel):  # the converter knew no other
            if way in SPLITS:
                backend.pre_tokenizer = SPLITS[way]
            elif way not in LIKE_GPT2 and not (way is None and metadata.get("general.architecture") in OF_GPT2):
                logger.warning(
                    "%s: tokenizer.ggml.pre is %s, so texts are cut into words as GPT-2 does, which may give other "
                    "tokens than the model was trained with; name a folder with its own tokenizer by --tokenizer",
                    path, "missing" if way is None else f"{way!r}, which is not known",
                )  # fmt: skip
        if way in WHOLE:
            backend.model.ignore_merges = True
    elif model == "llama" and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        _without_first_space(backend)


def _way(metadata: Mapping[str, Any]) -> str | None:
    way = metadata.get("tokenizer.ggml.pre")
    return way if isinstance(way, str) else None


def _without_first_space(backend: Tokenizer) -> None:
    """Of a SentencePiece vocabulary, for which the converter puts a space before every text and takes one away from
    every answer."""
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    elif isinstance(backend.normalizer, normalizers.Sequence):  # Phi-3's
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
