"""Text from tokens: nothing half-decoded, stop strings cut exactly wherever token boundaries fall."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from flexbatch.request import SamplingParams
from flexbatch.text.decoder import Detokenizer, TextDecoder
from flexbatch.text.detokenize import Finish, OutputText
from flexbatch.text.stops import first_stop

fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
EOS = 1
token_streams = st.lists(st.integers(2, 300), max_size=40)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def byte_ids(tokenizer, text: str) -> list[int]:
    """One token a byte: the worst case for characters and stop strings."""
    from tokenizers.pre_tokenizers import ByteLevel

    spelled = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    return [tokenizer.convert_tokens_to_ids(letter) for letter in spelled]


def output(tokenizer, max_tokens: int = 1000, **params) -> OutputText:
    return OutputText(TextDecoder(tokenizer), SamplingParams(max_tokens=max_tokens, **params), eos_token_ids=(EOS,))


@fixtures
@given(tokens=token_streams)
def test_incremental_text_grows_and_ends_as_the_whole_decoded_at_once(tokenizer, tokens: list[int]) -> None:
    stream, seen = Detokenizer(TextDecoder(tokenizer)), ""
    for count, token in enumerate(tokens, 1):
        stream.append(token)
        whole = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        assert stream.text.startswith(seen)
        assert stream.text + stream.pending == whole
        assert not stream.text.endswith("\ufffd") or whole.endswith("\ufffd" * 4), (
            "three bytes may still become a character"
        )
        seen = stream.text


@pytest.mark.parametrize("text", ["größer", "漢字", "🙂🙂", "a🙂b", "naïve \n x"])
def test_no_half_character_is_ever_shown(tokenizer, text: str) -> None:
    stream = Detokenizer(TextDecoder(tokenizer))
    for token in byte_ids(tokenizer, text):
        stream.append(token)
        assert "\ufffd" not in stream.text and text.startswith(stream.text)
    assert stream.text == text


def test_spaces_that_belong_to_the_next_piece_survive() -> None:
    """SentencePiece style: a piece carries its leading space, which the first piece of a decoded text loses."""
    words = ["\u2581stop", "\u2581here", "x", "\u2581"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="x"))
    model.decoder = decoders.Metaspace()
    pieces = PreTrainedTokenizerFast(tokenizer_object=model)
    stream = Detokenizer(TextDecoder(pieces))
    for token in (0, 1, 2, 3, 1):
        stream.append(token)
    assert stream.text == pieces.decode([0, 1, 2, 3, 1]) == "stop herex  here"
    result = OutputText(TextDecoder(pieces), SamplingParams(max_tokens=9, stop="p h"))
    assert (result.extend([0, 1, 2]), result.text) == (2, "sto")


@fixtures
@given(tokens=token_streams.filter(bool))
def test_text_without_a_stop_is_the_decoded_tokens(tokenizer, tokens: list[int]) -> None:
    for stops in ((), ("never in there",)):
        result = output(tokenizer, len(tokens), stop=stops)
        assert result.extend(tokens) == len(tokens)
        assert result.finish == Finish("length")
        assert result.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert result.token_ids == tokens


texts = st.text(st.sampled_from("abSTOP é漢🙂\n"), max_size=20)


@fixtures
@given(before=texts, stop=texts.filter(bool), after=texts, single_bytes=st.booleans(), whole=st.booleans())
def test_a_stop_string_is_cut_exactly(
    tokenizer, before: str, stop: str, after: str, single_bytes: bool, whole: bool
) -> None:
    text = before + stop + after
    tokens = byte_ids(tokenizer, text) if single_bytes else ids(tokenizer, text)
    result = output(tokenizer, stop=[stop, "zzz"])
    kept = result.extend(tokens) if whole else sum(result.extend([token]) for token in tokens)
    assert result.finish == Finish("stop", stop)
    assert result.text == text[: text.find(stop)]
    assert kept == len(result.token_ids)
    # The kept tokens are the fewest whose text holds the stop string.
    assert stop in tokenizer.decode(tokens[:kept]) and stop not in tokenizer.decode(tokens[: kept - 1])


def test_a_stop_string_is_seen_before_the_next_character_is_whole(tokenizer) -> None:
    class Pairs:
        """Token 0 is "END" and the first byte of an emoji, as merges over bytes may make."""

        def decode(self, token_ids, skip_special_tokens):
            return b"".join([b"END\xf0", b"\x9f\x99\x82", b"x"][t] for t in token_ids).decode(errors="replace")

    result = OutputText(TextDecoder(Pairs()), SamplingParams(max_tokens=9, stop="END"))
    assert result.append(0) == Finish("stop", "END")
    assert result.text == ""


@pytest.mark.parametrize(
    ("text", "stops", "found"),
    [
        ("abcabc", ["c", "b"], (1, "b")),
        ("abc", ["b", "bc"], (1, "bc")),
        ("abc", ["x"], (3, None)),
        ("", ["x"], (0, None)),
        ("xaxa", ["xa"], (0, "xa")),
    ],
)
def test_the_earliest_stop_wins(text: str, stops: list[str], found: tuple) -> None:
    assert first_stop(text, stops) == found


def test_eos_and_stop_tokens_are_kept_as_tokens_but_not_as_text(tokenizer) -> None:
    hello, comma = ids(tokenizer, "stop here"), ids(tokenizer, ",")
    result = output(tokenizer)
    assert result.extend([*hello, EOS, *comma]) == len(hello) + 1
    assert (result.text, result.finish, result.token_ids[-1]) == ("stop here", Finish("stop"), EOS)
    result = output(tokenizer, stop_token_ids=comma)
    result.extend([*hello, *comma, EOS])
    assert (result.text, result.finish) == ("stop here", Finish("stop", comma[0]))


def test_ignore_eos_goes_on(tokenizer) -> None:
    hello = ids(tokenizer, "stop")
    result = output(tokenizer, 2 * len(hello) + 1, ignore_eos=True)
    result.extend([*hello, EOS, *hello, EOS])
    assert (result.text, result.finish) == ("stopstop", Finish("length"))
    result = output(tokenizer, ignore_eos=True, stop_token_ids=[EOS])
    result.extend([*hello, EOS])
    assert result.finish == Finish("stop", EOS)


def test_a_stop_string_beats_the_length_limit(tokenizer) -> None:
    tokens = byte_ids(tokenizer, "abSTOP")
    result = output(tokenizer, len(tokens), stop="STOP")
    result.extend(tokens)
    assert (result.finish, result.text) == (Finish("stop", "STOP"), "ab")


def test_the_context_limits_the_output(tokenizer) -> None:
    result = OutputText(TextDecoder(tokenizer), SamplingParams(max_tokens=50), prompt_token_ids=[9] * 7, max_context=10)
    assert result.extend([40, 41, 42, 43]) == 3
    assert result.finish == Finish("length")
    assert OutputText(TextDecoder(tokenizer), SamplingParams(max_tokens=0)).finish == Finish("length")


def test_text_so_far_holds_back_half_a_character(tokenizer) -> None:
    result = output(tokenizer)
    result.extend(byte_ids(tokenizer, "a漢")[:-1])
    assert result.text == "a" and result.finish is None


def test_text_so_far_holds_back_what_may_become_a_stop_string(tokenizer) -> None:
    result = output(tokenizer, stop=["abcd", "bx"])
    shown = []
    for token in byte_ids(tokenizer, "yabzabcbabcd"):
        result.append(token)
        shown.append(result.text)
    assert shown == [
        "y",
        "y",
        "y",
        "yabz",
        "yabz",
        "yabz",
        "yabz",
        "yabzabc",
        "yabzabcb",
        "yabzabcb",
        "yabzabcb",
        "yabzabcb",
    ]
    assert result.finish == Finish("stop", "abcd")


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=60)
@given(
    text=st.text("ab漢", min_size=1, max_size=14),
    stops=st.lists(st.text("ab漢", min_size=1, max_size=4), min_size=1, max_size=3),
    least=st.integers(0, 12),
    step=st.integers(1, 4),
    special=st.booleans(),
)
def test_a_stop_string_within_the_first_min_tokens_counts_for_nothing(tokenizer, text, stops, least, step, special):
    """As in vLLM: it counts if a token after ``min_tokens`` completes it, wherever it begins. Against the text decoded
    anew."""
    tokens = [*([0] if special else []), *byte_ids(tokenizer, text)]
    least = min(least, len(tokens))
    result = output(tokenizer, len(tokens), stop=stops, min_tokens=least, ignore_eos=True)
    shown = ""
    for position in range(0, len(tokens), step):
        result.extend(tokens[position : position + step])
        shown += result.take()
        result.check()

    def read(count: int) -> str:
        return tokenizer.decode(tokens[:count], skip_special_tokens=True).rstrip("\ufffd")

    passed, wanted, kept = len(read(least)), tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)
    for count in range(least + 1, len(tokens) + 1):
        positions = [
            position
            for stop in stops
            for position in range(len(text))
            if read(count).startswith(stop, position) and position + len(stop) > passed
        ]
        if positions:
            wanted, kept = read(count)[: min(positions)], count
            break
    assert (result.text, len(result.token_ids), shown) == (wanted, kept, wanted)
    assert result.finish is not None and result.finish.reason == ("stop" if len(wanted) < len(text) else "length")


def test_special_tokens_in_stop_strings_keep_to_min_tokens_too(tokenizer) -> None:
    end = tokenizer.convert_tokens_to_ids("</s>")
    a, b = byte_ids(tokenizer, "ab")
    stopped = Finish("stop", "a</s>")
    for least, finish, count in ((0, stopped, 2), (2, stopped, 5), (5, Finish("length"), 6)):
        result = output(tokenizer, 6, stop="a</s>", min_tokens=least, ignore_eos=True)
        result.extend([a, end, b, a, end, b])
        assert (result.finish, len(result.token_ids)) == (finish, count)


def test_no_token_after_the_end(tokenizer) -> None:
    result = output(tokenizer)
    result.append(EOS)
    assert result.extend([5]) == 0
    with pytest.raises(RuntimeError, match="after the end"):
        result.append(5)


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    result = OutputText(None, SamplingParams(max_tokens=2))
    result.extend([5, 6])
    assert (result.token_ids, result.text, result.finish) == ([5, 6], "", Finish("length"))
    with pytest.raises(ValueError, match="need a tokenizer"):
        OutputText(None, SamplingParams(stop="x"))
