"""Answers in the context of their prompts, for every kind of tokenizer: the text, what is shown as it grows, and
stop strings with and without special tokens."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from flexbatch.request import SamplingParams
from flexbatch.text.decoder import WINDOW, TextDecoder, common_length
from flexbatch.text.detokenize import Finish, OutputText
from tests.text.kinds import KINDS, SPECIAL

FEW_AND_MANY = [20, pytest.param(500, marks=pytest.mark.slow)]
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


@cache
def decoder_of(kind: str) -> TextDecoder:
    return TextDecoder(tokenizer_of(kind))


def trying(examples: int) -> settings:
    return settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=examples)


def words(kind: str, text: str) -> list[int]:
    """The text's words as tokens, each with its space where the tokenizer has that."""
    tokenizer = tokenizer_of(kind)
    mark = "\u2581" if kind.startswith(("unigram", "metaspace", "byte-f")) else ""
    spelled = [mark + word for word in text.split()]
    return (
        tokenizer.encode(text, add_special_tokens=False)
        if kind in ("byte-level", "tidy-words")
        else tokenizer.convert_tokens_to_ids(spelled)
    )


def less(whole: str, context: str) -> str:
    return whole[common_length(context, whole) :]


def reference(tokenizer, prompt: list[int], answer: list[int], special: bool = False) -> str:
    """decode(prompt + answer) less decode(prompt)."""
    hidden = not special
    return less(
        tokenizer.decode(prompt + answer, skip_special_tokens=hidden),
        tokenizer.decode(prompt, skip_special_tokens=hidden),
    )


def token_ids(kind: str, max_size: int) -> st.SearchStrategy[list[int]]:
    """Ids of all sorts: ordinary ones, single bytes in runs, special ones, and one that the tokenizer does not have."""
    tokenizer = tokenizer_of(kind)
    size = len(tokenizer)
    bytes_alike = sorted(decoder_of(kind).byte_pieces) or [0]
    special = tokenizer.convert_tokens_to_ids(SPECIAL)
    one = st.integers(0, size - 1) | st.sampled_from(special) | st.just(size + 3)
    run = st.sampled_from(["漢", "é", "🙂", "a"]).flatmap(lambda text: st.just(encode_bytes(kind, text)))
    some = st.lists(one, max_size=4) | run | st.lists(st.sampled_from(bytes_alike), max_size=3)
    return st.lists(some, max_size=max_size).map(lambda parts: [token for part in parts for token in part])


def encode_bytes(kind: str, text: str) -> list[int]:
    """The text byte by byte where the tokenizer can, else as it encodes it."""
    tokenizer, positions = tokenizer_of(kind), {byte: token for token, byte in decoder_of(kind).byte_pieces.items()}
    return (
        [positions[byte] for byte in text.encode()] if positions else tokenizer.encode(text, add_special_tokens=False)
    )


@every_kind
@pytest.mark.parametrize("examples", FEW_AND_MANY)
def test_the_text_is_what_prompt_and_answer_decode_to_less_the_prompt(kind: str, examples: int) -> None:
    tokenizer = tokenizer_of(kind)

    @trying(examples)
    @given(prompt=token_ids(kind, 12), answer=token_ids(kind, 30), step=st.integers(1, 4))
    def check(prompt: list[int], answer: list[int], step: int) -> None:
        output = OutputText(
            decoder_of(kind), SamplingParams(max_tokens=len(answer) + 1, ignore_eos=True), prompt_token_ids=prompt
        )
        shown = ""
        for position in range(0, len(answer), step):
            output.extend(answer[position : position + step])
            shown += output.take()
            output.check()
            assert output.text == shown
        output.extend([tokenizer.convert_tokens_to_ids("<s>")])
        wanted = reference(tokenizer, prompt, answer)
        assert output.text == wanted
        assert wanted.startswith(shown), (shown, wanted)
        assert shown + output.take() == wanted

    check()


@every_kind
@pytest.mark.parametrize("prompt", ["", "the cats sat at", "the", "at ", "\n", "漢字"])
def test_spaces_before_the_answer_survive(kind: str, prompt: str) -> None:
    tokenizer = tokenizer_of(kind)
    answer = words(kind, "the cats")
    given = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    output = OutputText(decoder_of(kind), SamplingParams(max_tokens=len(answer)), prompt_token_ids=given)
    output.extend(answer)
    assert output.text == reference(tokenizer, given, answer)


def test_a_stop_string_at_the_very_start_begins_with_its_space() -> None:
    for kind in ("unigram-always", "metaspace-bpe-always", "byte-fallback-llama", "byte-fallback-gemma"):
        tokenizer = tokenizer_of(kind)
        at, the, cats = tokenizer.convert_tokens_to_ids(["at", "\u2581the", "\u2581cats"])
        output = OutputText(decoder_of(kind), SamplingParams(max_tokens=9, stop=" the"), prompt_token_ids=[at])
        assert (output.extend([the, cats]), output.finish, output.text) == (1, Finish("stop", " the"), ""), kind


@every_kind
@pytest.mark.parametrize("examples", FEW_AND_MANY)
def test_the_first_stop_string_ends_the_answer_with_special_tokens_and_without(kind: str, examples: int) -> None:
    """Against the whole text, decoded anew after every token."""
    tokenizer, decoder = tokenizer_of(kind), decoder_of(kind)

    @trying(examples)
    @given(prompt=token_ids(kind, 6), answer=token_ids(kind, 14), data=st.data())
    def check(prompt: list[int], answer: list[int], data: st.DataObject) -> None:
        special = data.draw(st.booleans())
        source = reference(tokenizer, prompt, answer, special)
        begin = data.draw(st.integers(0, max(0, len(source) - 1)))
        stops = [
            source[begin : begin + data.draw(st.integers(1, 14))],
            *data.draw(st.lists(st.sampled_from(["x", "the", " ", "ab"]), max_size=2)),
        ]
        stops = [stop for stop in stops if stop and "\ufffd" not in stop]
        output = OutputText(
            decoder, SamplingParams(max_tokens=len(answer) + 1, ignore_eos=True, stop=stops), prompt_token_ids=prompt
        )
        shown = ""
        for count in range(1, len(answer) + 1):
            output.append(answer[count - 1])
            output.check()
            visible, spelled = (
                reference(tokenizer, prompt, answer[:count], each).rstrip("\ufffd") for each in (False, True)
            )
            expected = any(
                stop in visible or across_special(kind, prompt, answer[:count], spelled, stop) for stop in stops
            )
            shown += output.take()
            if output.finish is not None:
                assert expected, (stops, visible, spelled)
                break
            assert not expected, (stops, visible, spelled)
        if output.finish is not None:
            stop = output.finish.stop_reason
            assert stop in stops
            assert reference(tokenizer, prompt, output.token_ids).startswith(output.text)
            if stop in visible:
                assert output.text == visible[: min(visible.find(each) for each in stops if each in visible)] or any(
                    each in spelled for each in stops
                )
        assert output.finish is None or output.text == shown

    check()


def across_special(kind: str, prompt: list[int], answer: list[int], spelled: str, stop: str) -> bool:
    """Whether the text with special tokens has the stop string where a special token is a part of it."""
    tokenizer, decoder = tokenizer_of(kind), decoder_of(kind)
    positions = [position for position, token in enumerate(answer) if decoder.is_special(token)]
    spans = [span(tokenizer, prompt, answer[:position], answer[position]) for position in positions]
    begins = [begin for begin in range(len(spelled)) if spelled.startswith(stop, begin)]

    def counts(begin: int, end: int) -> bool:
        touched = [(before, after) for before, after in spans if begin < after and before < end]
        return bool(touched) and not any(before < begin and end < after for before, after in touched)

    return any(counts(begin, begin + len(stop)) for begin in begins)


def span(tokenizer, prompt: list[int], answer: list[int], special: int) -> tuple[int, int]:
    """Where a special token stands in the text that it ends, with the space that the tokenizer writes before it. What
    the token changes of the text before it, as clean-up of spaces does, is no part of it."""
    text = reference(tokenizer, prompt, [*answer, special], True)
    begin = len(text) - len(tokenizer.decode([special]))
    own_space = text[:begin].endswith(" ") and len(reference(tokenizer, prompt, answer, True)) < begin
    return begin - own_space, len(text)


IM_END = "<|im_end|>"


@every_kind
@pytest.mark.parametrize("stop", ["d", "im_end", "_"])
def test_letters_inside_of_a_special_token_end_no_answer(kind: str, stop: str) -> None:
    tokenizer = tokenizer_of(kind)
    answer = tokenizer.convert_tokens_to_ids([IM_END, IM_END])
    output = OutputText(decoder_of(kind), SamplingParams(max_tokens=9, stop=stop))
    assert (output.extend(answer), output.finish) == (2, None)


@every_kind
@pytest.mark.parametrize(
    "stop", [IM_END, "cats" + IM_END, IM_END + "<|im_start|>", "s" + IM_END + "<|im_start|>", "|>", "</s>"]
)
def test_stop_strings_that_are_or_hold_special_tokens(kind: str, stop: str) -> None:
    tokenizer = tokenizer_of(kind)
    if kind == "tidy-words":
        stop = stop.replace("cats", "s")
    answer = words(kind, "the cats")
    ends = tokenizer.convert_tokens_to_ids(["</s>" if stop == "</s>" else IM_END, "<|im_start|>"])
    whole = tokenizer.decode([*answer, *ends])
    if stop not in whole:  # WordPiece writes a space before a special token
        stop = stop.replace(IM_END, " " + IM_END).replace("<|im_start|>", " <|im_start|>").lstrip()
    assert stop in whole
    prompt = words(kind, "at")
    for tokens in ([*answer, *ends, *answer], [*answer, *answer, *ends, *answer]):
        output = OutputText(
            decoder_of(kind),
            SamplingParams(max_tokens=50, stop=["never", stop], ignore_eos=True),
            prompt_token_ids=prompt,
        )
        shown = ""
        for token in tokens:
            output.extend([token])
            shown += output.take()
        assert output.finish == Finish("stop", stop)
        assert output.token_ids == tokens[: tokens.index(ends[0]) + (2 if "<|im_start|>" in stop else 1)]
        wanted = reference(tokenizer, prompt, tokens[: tokens.index(ends[0])])
        before = stop.split(IM_END)[0] if IM_END in stop else ""
        wanted = wanted[: len(wanted) - len(before.rstrip())] if before else wanted
        assert output.text.rstrip() == wanted.rstrip() and shown == output.text


def test_the_beginning_of_a_stop_string_is_held_back_across_a_special_token() -> None:
    tokenizer = tokenizer_of("byte-level")
    a, end, b, c, x = tokenizer.convert_tokens_to_ids(["a", IM_END, "b", "c", "x"])
    for last, text in ((c, "x"), (x, "xabx")):
        output = OutputText(
            decoder_of("byte-level"), SamplingParams(max_tokens=5, stop="a" + IM_END + "bc"), prompt_token_ids=[x]
        )
        shown = []
        for token in (x, a, end, b):
            output.append(token)
            shown.append(output.take())
        assert shown == ["x", "", "", ""]
        output.append(last)
        assert output.text == text and output.text == "x" + output.take()


@pytest.mark.parametrize("stop", [" a ", " a <unk>", "a <unk>"])
def test_text_is_held_back_while_its_spaces_may_be_tidied_up(stop: str) -> None:
    """ "a" is certain without special tokens; with them it is " a", the beginning of a stop string and not certain."""
    tokenizer = tokenizer_of("word-piece-tidy")
    unknown, a = tokenizer.convert_tokens_to_ids(["<unk>", "a"])
    output = OutputText(
        decoder_of("word-piece-tidy"), SamplingParams(max_tokens=9, stop=stop), prompt_token_ids=[unknown]
    )
    output.append(a)
    assert output.take() == ""
    output.append(unknown)
    assert (output.finish, output.text, output.take()) == (Finish("stop", stop), "", "")


@pytest.mark.parametrize(("stop", "ends"), [("'", False), ("'<", True), ("'<s>", True), ("<", True)])
def test_a_quote_of_the_prompt_that_a_special_token_tidies_up_is_no_part_of_it(stop: str, ends: bool) -> None:
    """ "<s> '" and "<s>" are "<s>'<s>": the answer is "'<s>" with special tokens, and empty without."""
    tokenizer = tokenizer_of("word-piece-tidy")
    begin, quote = tokenizer.convert_tokens_to_ids(["<s>", "'"])
    output = OutputText(
        decoder_of("word-piece-tidy"),
        SamplingParams(max_tokens=9, stop=[stop, "</s>"]),
        prompt_token_ids=[begin, quote],
    )
    output.append(begin)
    assert (output.finish, output.text) == (Finish("stop", stop) if ends else None, "")


def test_an_eos_that_completes_a_stop_string_takes_its_text_away_and_alone_stays_eos() -> None:
    tokenizer = tokenizer_of("byte-level")
    a, newline, end = tokenizer.convert_tokens_to_ids(["a", "Ċ", "</s>"])
    for stop, finish, text in (
        ("\n</s>", Finish("stop", "\n</s>"), "a"),
        ("</s>", Finish("stop"), "a\n"),
        ("x</s>", Finish("stop"), "a\n"),
    ):
        output = OutputText(
            decoder_of("byte-level"), SamplingParams(max_tokens=9, stop=stop), eos_token_ids=[end], prompt_token_ids=[a]
        )
        output.extend([a, newline, end, a])
        assert (output.finish, output.text, output.token_ids) == (finish, text, [a, newline, end])


class Counting:
    """Counts the tokens that it decodes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer, self.tokens = tokenizer, 0

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def decode(self, ids, **options) -> str:
        self.tokens += len(ids)
        return self._tokenizer.decode(ids, **options)


@every_kind
@pytest.mark.parametrize("what", ["text", "one byte", "special", "unknown"])
@pytest.mark.parametrize("stop", [(), ("never there",)])
def test_a_token_costs_a_window_however_long_the_answer(kind: str, what: str, stop: tuple[str, ...]) -> None:
    counting = Counting(tokenizer_of(kind))
    broken = (
        next(iter(decoder_of(kind).byte_pieces), None)
        if kind.startswith("byte-f")
        else counting.convert_tokens_to_ids("ð")
    )
    one = {"text": words(kind, "the cats sat at"), "one byte": [broken or 5]}
    one |= {"special": [counting.convert_tokens_to_ids(IM_END)], "unknown": [len(counting) + 9]}
    answer = (one[what] * 600)[:600]
    output = OutputText(
        TextDecoder(counting), SamplingParams(max_tokens=len(answer), stop=stop), prompt_token_ids=one["text"] * 400
    )
    text = ""
    for token in answer:
        output.append(token)
        text += output.take()
    assert counting.tokens <= 5 * 2 * WINDOW * len(answer) + 2 * len(answer), counting.tokens / len(answer)
    assert text == output.text
