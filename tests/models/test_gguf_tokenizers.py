"""Tokenizers of GGUF files: those of both kinds, with as many tokens as the file has."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from flexbatch.models.resolve import load_tokenizer
from flexbatch.validation.errors import CheckpointError
from tests.gguf_writer import add_tokenizer
from tests.tiny_models import make_tokenizer

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581" + string.ascii_lowercase]
WORDS = ["he", "ll", "hell", "hello", "\u2581hello", "<end>"]


def write(path: Path, add: Callable[[GGUFWriter], None]) -> Path:
    writer = GGUFWriter(path, "llama")
    add(writer)
    writer.add_tensor("t", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sentencepiece(writer: GGUFWriter) -> None:
    tokens = [*PIECES, *WORDS]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(index) for index in range(len(tokens) - 259)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 260) + [3])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", sentencepiece))
    ids = {token: index for index, token in enumerate([*PIECES, *WORDS])}
    assert len(tokenizer) == len(ids) and tokenizer.get_vocab() == ids
    assert tokenizer("hello").input_ids == [1, ids["\u2581hello"]]
    assert tokenizer("hello<end>", add_special_tokens=False).input_ids == [ids["\u2581hello"], ids["<end>"]]
    assert tokenizer("\u00e9", add_special_tokens=False).input_ids == [ids["\u2581"], ids["<0xC3>"], ids["<0xA9>"]]
    for text in ("hello hello", "h\u00e9 \U0001f950 x"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    bare = load_tokenizer(tmp_path / "x.gguf", add_bos_token=False)
    assert bare("hello").input_ids == [ids["\u2581hello"]] and bare.get_vocab() == ids


def test_no_token_is_added(tmp_path: Path) -> None:
    """The converter's class for byte-level vocabularies brings <|endoftext|> along, which would have no embedding."""
    original = make_tokenizer()
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", lambda writer: add_tokenizer(writer, original, 307)))
    assert len(tokenizer) == 307 and tokenizer.get_vocab() == original.get_vocab()
    for text in ("<|endoftext|>", "<s>hello <|endoftext|></s>"):
        assert tokenizer(text).input_ids == original(text).input_ids
    assert tokenizer.decode([1, 50, 2], skip_special_tokens=True) == original.decode(
        [1, 50, 2], skip_special_tokens=True
    )


@pytest.mark.parametrize(
    "add, message",
    [
        (lambda writer: None, "has no tokenizer: tokenizer.ggml.tokens is missing"),
        (lambda writer: writer.add_token_list(["a", "b"]), "tokenizer.ggml.model is missing"),
        (lambda writer: (writer.add_tokenizer_model("rwkv"), writer.add_token_list(["a"])), "'rwkv'"),
        (
            lambda writer: (sentencepiece(writer), writer.add_pad_token_id(100_000)),
            "padding_token_id=100000 is no token of 292",
        ),
    ],
)
def test_what_cannot_be_converted_is_said(add: Callable[[GGUFWriter], None], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", add)
    with pytest.raises(CheckpointError, match=f"{path}.*{message}"):
        load_tokenizer(path)


@pytest.mark.parametrize("version", ["4.56.0", "5.17.0", "5.22.2"])
def test_older_releases_of_transformers_are_refused(version: str, tmp_path: Path, monkeypatch) -> None:
    """They take another token for EOS, or none for BOS, and say nothing."""
    monkeypatch.setattr("transformers.__version__", version)
    path = write(tmp_path / "x.gguf", lambda writer: add_tokenizer(writer, make_tokenizer(), 307))
    with pytest.raises(CheckpointError, match=rf"needs transformers 5\.23 or newer, and {version} is installed"):
        load_tokenizer(path)
