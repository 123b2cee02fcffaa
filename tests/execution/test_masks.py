"""Masks at sampling: the distribution under them, and threads that compute them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from flexbatch.execution.masks import GrammarFollower, MaskWorkers, masked
from flexbatch.execution.pass_batch import QueryTokens
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.sampling import process_logits, sample
from flexbatch.execution.sequence import Sequence
from flexbatch.request import Request, SamplingParams
from flexbatch.text.grammars import Grammars
from flexbatch.validation.structured_fields import StructuredOutputsParams
from tests.text.kinds import KINDS

pytest.importorskip("llguidance")
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = KINDS["byte-level"]()
    return Grammars(tokenizer, len(tokenizer) + 3)


def sequence_of(grammars: Grammars, form, index: int = 0, **params) -> Sequence:
    tokenizer = grammars._tokenizer
    params = {"max_tokens": 20, "temperature": 1.0, "structured_outputs": form, **params}
    request = Request(index, PROMPT, SamplingParams(**params))
    grammar = grammars.compile(request.params.structured_outputs)
    follower = GrammarFollower(grammar, {tokenizer.eos_token_id})
    return Sequence(
        request,
        grammars.decoder,
        eos_token_ids=(tokenizer.eos_token_id,),
        sequence_id=index,
        grammar=follower,
    )


def ids(grammars: Grammars, text: str) -> list[int]:
    return grammars._tokenizer(text, add_special_tokens=False)["input_ids"]


REGEX = {"regex": "[at ]{2}|h"}


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"repetition_penalty": 1.5},
     {"logit_bias": {64: 2.0, 70: 50.0}}, {"presence_penalty": 1.0}, {"suppress_tokens": (64, 65)}],
    ids=str,
)  # fmt: skip
def test_the_distribution_is_the_renormalized_one_of_the_allowed_tokens(grammars: Grammars, params) -> None:
    """By enumeration, at the beginning, within a drafted path and at a place where the answer may end."""
    at, eos = ids(grammars, "a")[0], grammars._tokenizer.eos_token_id
    logits = torch.randn(3, grammars._vocab_size, generator=torch.Generator().manual_seed(3)) * 3
    paths = [(), (at,), (ids(grammars, "h")[0],)]
    constrained = [sequence_of(grammars, REGEX, **params)] * 3
    found = process_logits(logits, constrained, paths)
    vocabulary = grammars.compile(constrained[0].params.structured_outputs).vocabulary
    for row, (path, most) in enumerate(zip(paths, (2, 1, 0), strict=True)):
        allowed = [token for token, piece in enumerate(vocabulary.bytes) if 0 < len(piece) <= most and not
                   set(piece) - set(b"at ")]  # fmt: skip
        allowed += [] if path else ids(grammars, "h")
        allowed += [] if most else [eos]
        plain = Sequence(Request(0, PROMPT, SamplingParams(max_tokens=20, **{"temperature": 1.0, **params})))
        only = torch.full_like(logits[row], -torch.inf)
        only[allowed] = logits[row, allowed]
        wanted = process_logits(only[None], [plain], [path])[0]
        assert torch.allclose(found[row], wanted, atol=1e-6), (params, path)
        assert found[row].sum().item() == pytest.approx(1, abs=1e-5)


def test_draws_follow_the_renormalized_distribution(grammars: Grammars) -> None:
    """Chi-square over many requests, each with its own random stream."""
    logits = torch.randn(1, grammars._vocab_size, generator=torch.Generator().manual_seed(9))
    many = [sequence_of(grammars, REGEX, index) for index in range(1500)]
    drawn = sample(logits.expand(len(many), -1), many).token_ids.bincount(minlength=logits.shape[1])
    wanted = process_logits(logits, many[:1])[0] * len(many)
    assert not drawn[wanted == 0].any()
    kept = wanted > 0
    statistic = ((drawn[kept] - wanted[kept]) ** 2 / wanted[kept]).sum().item()
    assert statistic < 3 * int(kept.sum()), (statistic, int(kept.sum()))


def test_log_probabilities_are_those_before_the_mask(grammars: Grammars) -> None:
    logits = torch.randn(1, grammars._vocab_size, generator=torch.Generator().manual_seed(1))
    drawn = sample(logits, [sequence_of(grammars, {"choice": ["h"]}, temperature=0, logprobs=1)])
    (h,) = ids(grammars, "h")
    assert drawn.token_ids.tolist() == [h]
    assert drawn.logprobs[0][h].logprob == pytest.approx(logits.log_softmax(-1)[0, h].item(), abs=1e-5)


def test_rows_without_a_grammar_are_left_alone_and_bits_are_counted_from_the_lowest() -> None:
    logits = torch.randn(3, 11)
    mask = np.packbits([1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1], bitorder="little")
    found = masked(logits, {1: mask})
    assert torch.equal(found[[0, 2]], logits[[0, 2]]) and not logits.isinf().any()
    assert found[1].isfinite().nonzero()[:, 0].tolist() == [0, 3, 10]
    assert masked(logits, {}) is logits
    assert torch.equal(masked(logits, {0: mask, 1: mask, 2: mask}).isfinite()[2], found[1].isfinite())


def test_forced_tokens_come_without_a_pass_and_the_end_of_the_grammar_is_the_end(grammars: Grammars) -> None:
    sequence = sequence_of(grammars, {"regex": "(that|hat) (he|that) [0-9]"})
    (t,) = ids(grammars, "t")
    assert sequence.extend([t]) == 1
    sequence.check()
    assert sequence.output.finish is None and sequence.needs_host
    text = grammars.decoder.decode(sequence.output.token_ids)
    assert text == "that " or text.rstrip() == "that", "what must follow is there"
    while sequence.output.finish is None:
        allowed = np.unpackbits(sequence.grammar.mask(), bitorder="little").nonzero()[0]
        assert len(allowed) > 1, "a token that must come was left to a pass"
        sequence.extend([int(allowed[-1])])
    assert sequence.output.finish.reason == "stop" and sequence.output.text[-1].isdigit()
    assert sequence.output.token_ids[-1] != grammars._tokenizer.eos_token_id, "no pass for the EOS"


@pytest.mark.parametrize("params", [{"logprobs": 0}, {"min_tokens": 2}], ids=str)
def test_what_looks_at_every_token_has_a_pass_for_each(grammars: Grammars, params) -> None:
    sequence = sequence_of(grammars, {"choice": ["that he", "h"]}, **params)
    sequence.extend(ids(grammars, "t"))
    assert sequence.num_output_tokens == 1


@pytest.mark.parametrize(("most", "reason"), [(2, "length"), (3, "stop"), (4, "stop")])
def test_an_answer_is_cut_or_whole(grammars: Grammars, most: int, reason: str) -> None:
    sequence = sequence_of(grammars, {"regex": "[0-9]{3}"}, max_tokens=most)
    kept = sequence.extend([*ids(grammars, "7") * 3, grammars._tokenizer.eos_token_id])
    assert (sequence.output.finish.reason, kept) == (reason, min(most, 3))
    assert sequence.output.text == "777"[:most]


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 10}], ids=str)
def test_a_whole_answer_ends_whatever_keeps_others_going(grammars: Grammars, params) -> None:
    sequence = sequence_of(grammars, {"choice": ["h", "at"]}, **params)
    sequence.extend(ids(grammars, "h"))
    assert sequence.output.finish.reason == "stop" and sequence.output.text == "h"


def test_a_forced_token_that_the_grammar_bars_is_not_forced(grammars: Grammars) -> None:
    """Else a forced end at max_tokens would fail the answers that it cuts."""
    eos, seven = grammars._tokenizer.eos_token_id, ids(grammars, "7")[0]
    logits = torch.randn(2, grammars._vocab_size)
    cut = sequence_of(grammars, {"regex": "[0-9]{3,5}"}, max_tokens=2, forced_eos_token_id=eos, temperature=0)
    open_ = sequence_of(grammars, {"regex": "[0-9]{1,5}"}, max_tokens=2, forced_eos_token_id=eos, temperature=0)
    drawn = sample(logits, [cut, open_], [(seven,), (seven,)]).token_ids.tolist()
    assert drawn[0] in {ids(grammars, digit)[0] for digit in "0123456789"} and drawn[1] == eos


def test_an_end_that_was_drafted_is_followed_and_not_a_fault(grammars: Grammars) -> None:
    """A draft that agrees writes EOS behind a whole answer, and something behind that."""
    eos, (h,) = grammars._tokenizer.eos_token_id, ids(grammars, "h")
    sequence = sequence_of(grammars, {"choice": ["h"]}, temperature=0)
    logits = torch.randn(3, grammars._vocab_size)
    tree = query(sequence, (h, eos), (-1, 0, 1))
    drawn = SampledTokens(sample(logits, [sequence] * 3, tree.paths).token_ids.tolist(), [None] * 3).follow(tree)
    drawn.mark_fault(0, sequence.grammar)
    assert drawn.fault is None and drawn.token_ids[:2] == [h, eos]
    assert sequence.extend(drawn.token_ids) == 1 and sequence.output.text == "h"


def test_a_token_that_does_not_follow_the_grammar_is_a_fault(grammars: Grammars) -> None:
    sequence = sequence_of(grammars, {"choice": ["that"]}, logprobs=0)
    sequence.extend(ids(grammars, "7"))
    assert sequence.fault is not None and not sequence.fault.in_model
    assert sequence.fault.problem.startswith("structured_outputs: ")
    assert not sequence.grammar.mask().any() and not sequence.grammar.complete and not sequence.grammar.forced()


def test_a_fault_does_not_quote_the_grammar(grammars: Grammars) -> None:
    """The library's message for a rule of more items than it takes holds all of them."""
    many = " | ".join(f'"a{number}"' for number in range(2_500))
    follower = GrammarFollower(grammars.compile(StructuredOutputsParams(grammar=f"start: {many}")), set())
    for token in ids(grammars, "a12"):
        follower.advance(token)
    assert "max is 2000" in follower.problem and "a1499" not in follower.problem
    assert "\n" not in follower.problem and len(follower.problem) < 600


def query(sequence: Sequence, tokens: tuple[int, ...] = (), parents=None) -> QueryTokens:
    return QueryTokens(
        sequence.sequence_id,
        (sequence.token_ids[-1], *tokens),
        len(sequence.token_ids) - 1,
        0,
        None,  # type: ignore[arg-type]
        len(PROMPT),
        parents,
    )


def test_masks_are_computed_in_other_threads_for_every_node_of_a_tree(grammars: Grammars, monkeypatch) -> None:
    seen, fill = [], GrammarFollower._fill

    def filled(self, state, path):
        seen.append((threading.current_thread() is threading.main_thread(), path))
        fill(self, state, path)

    monkeypatch.setattr(GrammarFollower, "_fill", filled)
    a, t = ids(grammars, "a")[0], ids(grammars, "t")[0]
    sequences = {i: sequence_of(grammars, {"regex": f"[at ]{{{i + 3}}}"}, i) for i in range(7)}
    bare = Sequence(Request(7, PROMPT, SamplingParams()), sequence_id=7)
    batch = [query(each, (a, t, 9), (-1, 0, 1, 0)) for each in sequences.values()]
    workers = MaskWorkers()
    workers.begin([*batch, query(bare)], {**sequences, 7: bare})
    for i, each in sequences.items():
        assert not each.grammar.mask((a,)).all() and each.grammar.mask((9,)).all()
        fresh = sequence_of(grammars, {"regex": f"[at ]{{{i + 3}}}"})
        for path in ((), (a,), (a, t)):
            assert np.array_equal(each.grammar.mask(path), GrammarFollower.mask(fresh.grammar, path)), path
        each.extend([a, t])
        assert np.array_equal(each.grammar.mask(), fresh.grammar.mask((a, t)))
    assert {path for main, path in seen if not main} == {(a,), (a, t), (9,)}
    workers.end()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flexbatch-masks")]
    workers.end()


def test_what_fails_in_a_thread_fails_the_pass(grammars: Grammars, monkeypatch) -> None:
    sequence, workers = sequence_of(grammars, {"regex": "[at ]{9}"}), MaskWorkers()
    monkeypatch.setattr(GrammarFollower, "_at", lambda self, path: 1 // 0)
    workers.begin([query(sequence)], {0: sequence})
    with pytest.raises(ZeroDivisionError):
        sequence.grammar.mask()
    workers.end()
