"""One small tokenizer of every kind that decodes in a way of its own, made on the spot."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = ["the", "cats", "sat", "at", "s", "t", "a", "漢字", ".", "'", "n", "n't", "?", "größer", "\n"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def vocabulary(*parts: list[str]) -> list[str]:
    return list(dict.fromkeys([*SPECIAL, "<unk>", *(token for part in parts for token in part)]))


def wrap(model: Tokenizer, **options) -> PreTrainedTokenizerFast:
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    model.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    unknown = {"unk_token": "<unk>"} if model.token_to_id("<unk>") is not None else {}
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", **unknown, **options)


def byte_level() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġt", "he", "Ġthe", "Ġa", "at", "æ¼", "¢Ġ", "âĤ", "ðŁ"]
    vocab = [*letters, *dict.fromkeys(words)]
    merges = [
        ("Ġ", "t"),
        ("h", "e"),
        ("Ġt", "he"),
        ("Ġ", "a"),
        ("a", "t"),
        ("æ", "¼"),
        ("¢", "Ġ"),
        ("â", "Ĥ"),
        ("ð", "Ł"),
    ]
    model = Tokenizer(models.BPE(vocab={token: position for position, token in enumerate(vocab)}, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.decoder = decoders.ByteLevel()
    return wrap(model)


def pieces() -> list[str]:
    return [piece for word in WORDS for piece in ("\u2581" + word, word)] + [
        "\u2581",
        "\u2581\u2581",
        "e",
        "o",
        "x",
        " ",
    ]


def metaspace(scheme: str, kind: str) -> PreTrainedTokenizerFast:
    """As tokenizers converts SentencePiece: Unigram (T5) or BPE; the first piece of a text loses its space when it
    is prepended."""
    vocab = vocabulary(pieces())
    if kind == "unigram":
        model = Tokenizer(
            models.Unigram([(token, -1.0 - len(token) / 100) for token in vocab], unk_id=vocab.index("<unk>"))
        )
    else:
        model = Tokenizer(
            models.BPE(vocab={token: position for position, token in enumerate(vocab)}, merges=[], unk_token="<unk>")
        )
    model.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme)
    model.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme=scheme)
    return wrap(model)


def byte_fallback(strips: bool) -> PreTrainedTokenizerFast:
    """As Llama 2 (which strips the first space of a text) and Gemma (which does not)."""
    vocab = vocabulary(BYTES, pieces())
    model = Tokenizer(
        models.BPE(
            vocab={token: position for position, token in enumerate(vocab)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    model.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("\u2581")] if strips else []), normalizers.Replace(" ", "\u2581")]
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return wrap(model)


def word_piece(tidies: bool) -> PreTrainedTokenizerFast:
    """As BERT; with clean-up of spaces by tokenizers and by transformers, or neither."""
    vocab = vocabulary(WORDS, ["##" + word for word in WORDS])
    model = Tokenizer(models.WordPiece({token: position for position, token in enumerate(vocab)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.decoder = decoders.WordPiece(prefix="##", cleanup=tidies)
    return wrap(model, clean_up_tokenization_spaces=tidies)


def tidy_words() -> PreTrainedTokenizerFast:
    """Words as they are, tidied up by transformers alone: spaces, quotes and letters come one by one."""
    vocab = vocabulary([" ", "'", ".", "?", "n", "t", "m", "s", "v", "e", "r", "a", " '", "n't", "  "])
    model = Tokenizer(models.WordLevel({token: position for position, token in enumerate(vocab)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    model.decoder = decoders.Fuse()
    return wrap(model, clean_up_tokenization_spaces=True)


KINDS = {
    "byte-level": byte_level,
    **{
        f"unigram-{scheme}": lambda scheme=scheme: metaspace(scheme, "unigram")
        for scheme in ("always", "first", "never")
    },
    **{f"metaspace-bpe-{scheme}": lambda scheme=scheme: metaspace(scheme, "bpe") for scheme in ("always", "never")},
    "byte-fallback-llama": lambda: byte_fallback(True),
    "byte-fallback-gemma": lambda: byte_fallback(False),
    "word-piece": lambda: word_piece(False),
    "word-piece-tidy": lambda: word_piece(True),
    "tidy-words": tidy_words,
}
