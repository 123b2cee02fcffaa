"""Tokenizers of GGUF files: those of both kinds, with as many tokens as the file has."""

from __future__ import annotations

import json
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


def write(path: Path, add: Callable[[GGUFWriter], None], architecture: str = "llama") -> Path:
    writer = GGUFWriter(path, architecture)
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


CUTS = {
    "smollm": "it 's ĊĊ 1 . ĠA 1 2 3 4 5 Ġ Ġ( b ) Ġ Ġc !?",
    "starcoder": "it 's ĊĊ 1 . ĠA 1 2 3 4 5 Ġ Ġ( b ) Ġ Ġc !?",
    "falcon": "it ' s Ċ Ċ 1 . ĠA 123 45 ĠĠ ( b ) Ġ Ġc !?",
    "bloom": "it's ĊĊ 1 . ĠA12345 ĠĠ( b )Ġ Ġc !?",
    "viking": "it's ĊĊ 1 . ĠA 1 2 3 4 5 ĠĠ( b )Ġ Ġc !?",
    "glm4": "it 's ĊĊ 1 . ĠA 123 45 Ġ Ġ( b ) Ġ Ġc !?",
    "stablelm2": "it 's ĊĊ 1 . ĠA 1 2 3 4 5 Ġ Ġ( b ) Ġ Ġc !?",
    "deepseek-coder": "it ' s Ċ Ċ 1 . ĠA 1 2 3 4 5 Ġ Ġ( b ) Ġ Ġc !?",
    "gpt-2": "it 's Ċ Ċ 1 . ĠA 12345 Ġ Ġ( b ) Ġ Ġc !?",
    "llama-bpe": "it 's ĊĊ 1 . ĠA 123 45 Ġ Ġ( b ) Ġ Ġc !?",
    "qwen2": "it 's ĊĊ 1 . ĠA 1 2 3 4 5 Ġ Ġ( b ) Ġ Ġc !?",
}
"""``tokenizer.ggml.pre`` -> what "it's\\n\\n1. A12345  (b)  c!?" is cut into before anything is merged."""


def named(way: str | None, more: Callable[[GGUFWriter], None] = lambda writer: None) -> Callable[[GGUFWriter], None]:
    """A byte-level vocabulary with a name of its way to cut texts, or none. BOS is not spoken of."""

    def add(writer: GGUFWriter) -> None:
        add_tokenizer(writer, make_tokenizer(), 307)
        keys = writer.kv_data[0]
        del keys["tokenizer.ggml.pre"], keys["tokenizer.ggml.add_bos_token"]
        if way is not None:
            writer.add_tokenizer_pre(way)
        more(writer)

    return add


def test_texts_are_cut_as_the_model_was_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for way, pieces in CUTS.items():
        tokenizer = load_tokenizer(write(tmp_path / f"{way}.gguf", named(way)))
        cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's\n\n1. A12345  (b)  c!?")
        assert [piece for piece, _ in cut] == pieces.split(), way
        for text in ("  one\n\n\n1. two's 10,000\t\u00e9", "a = [1,  22]\r\n"):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert not caplog.records
    for way, said in (("unheard-of", "'unheard-of', which is not known"), (None, "is missing")):
        load_tokenizer(write(tmp_path / "x.gguf", named(way)))
        [record] = caplog.records
        assert said in record.getMessage() and "--tokenizer" in record.getMessage()
        caplog.clear()


def test_llama_3_takes_words_whole_and_begins_with_bos(tmp_path: Path) -> None:
    """Also in files that do not say so: the converters of 2024 left it out."""

    original = make_tokenizer()
    first = " ".join(json.loads(original.backend_tokenizer.to_str())["model"]["merges"][0])

    def without_merges(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop("tokenizer.ggml.merges")
        writer.add_token_merges([first])

    words = (token for token in original.get_vocab() if len(token) > 1 and token.isascii() and token.isalpha())
    whole = next(word for word in words if first.replace(" ", "") not in word)
    for way, bos, pieces in (("llama-bpe", [1], 1), ("qwen2", [], len(whole))):
        tokenizer = load_tokenizer(write(tmp_path / f"{way}.gguf", named(way, without_merges)))
        ids = tokenizer(whole).input_ids
        assert ids[: len(bos)] == bos and len(ids) == len(bos) + pieces
        assert tokenizer(whole, add_special_tokens=False).input_ids == ids[len(bos) :]
    said = load_tokenizer(write(tmp_path / "x.gguf", named("tekken", lambda writer: writer.add_add_bos_token(False))))
    assert said("a").input_ids == said("a", add_special_tokens=False).input_ids


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_no_space_before_a_text_where_the_file_says_so(architecture: str, tmp_path: Path) -> None:
    ids = {token: index for index, token in enumerate([*PIECES, *WORDS])}

    def add(writer: GGUFWriter) -> None:
        sentencepiece(writer)
        writer.add_add_space_prefix(False)

    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", add, architecture))
    assert tokenizer("hello hello").input_ids == [1, ids["hello"], ids["\u2581hello"]]
    for text in ("hello hello", " x", "h\u00e9 "):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "add, message",
    [
        (lambda writer: None, "has no tokenizer: tokenizer.ggml.tokens is missing"),
        (lambda writer: writer.add_token_list(["a", "b"]), "tokenizer.ggml.model is missing"),
        (lambda writer: (writer.add_tokenizer_model("gpt2"), writer.add_token_list(["a"])), "ggml.merges is missing"),
        (
            lambda writer: (writer.add_tokenizer_model("llama"), writer.add_token_list(["a"])),
            "ggml.merges or scores is missing",
        ),
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
