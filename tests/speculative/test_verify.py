"""Verification keeps the target's distribution: the production functions run over every outcome of chance, with
exact probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from flexbatch.execution.pass_batch import QueryTokens
from flexbatch.memory.pages import SequencePages
from flexbatch.speculative.shapes import fixed_widths
from flexbatch.speculative.tree import Drawing, TokenTree, TreeShape, chain
from flexbatch.speculative.verify import AcceptedPath, verify
from tests.speculative.tree_paths import path_tokens

T = TypeVar("T")
Prefix = tuple[int, ...]


class Script:
    """Draws that replay a list of choices and take the first possible outcome after it; ``weight`` is the
    probability of all choices taken."""

    def __init__(self, choices: list[int]) -> None:
        self.choices, self.weight = choices, 1.0
        self.taken: list[int] = []
        self.last: list[bool] = []
        """Per choice: no later option has a chance."""

    def pick(self, probabilities: list[float]) -> int:
        possible = [i for i, probability in enumerate(probabilities) if probability > 0]
        step = len(self.taken)
        position = self.choices[step] if step < len(self.choices) else 0
        self.taken.append(position)
        self.last.append(position + 1 == len(possible))
        self.weight *= probabilities[possible[position]]
        return possible[position]

    def accept(self, depth: int, rank: int, probability: float) -> bool:
        return self.pick([probability, 1.0 - probability]) == 0

    def token(self, depth: int, probabilities: Tensor) -> int:
        return self.pick(probabilities.tolist())


def outcomes(procedure: Callable[[Script], T]) -> Iterator[tuple[float, T]]:
    """Every possible outcome of ``procedure`` with its exact probability: depth-first over its choices."""
    choices: list[int] = []
    while True:
        script = Script(choices)
        result = procedure(script)
        yield script.weight, result
        choices = script.taken
        while choices and script.last[len(choices) - 1]:
            choices.pop()
        if not choices:
            return
        choices[-1] += 1


class Model:
    """A random distribution for every prefix; some tokens impossible, as after top-k or top-p."""

    def __init__(self, vocab: int, seed: int, zeros: float = 0.0, sharpness: float = 1.0) -> None:
        self.vocab, self.seed, self.zeros, self.sharpness = vocab, seed, zeros, sharpness

        self._known: dict[Prefix, Tensor] = {}

    def __call__(self, prefix: Prefix) -> Tensor:
        if prefix not in self._known:
            self._known[prefix] = self._draw(prefix)
        return self._known[prefix]

    def _draw(self, prefix: Prefix) -> Tensor:
        generator = np.random.default_rng([self.seed, *prefix, 99])
        weights = generator.exponential(size=self.vocab) ** self.sharpness
        drop = generator.random(self.vocab) < self.zeros
        drop[generator.integers(self.vocab)] = False
        weights[drop] = 0
        return torch.from_numpy(weights / weights.sum())


def draw_tree(draft: Model, shape: TreeShape, drawn: Drawing, script: Script) -> tuple[TokenTree, list[Tensor]]:
    """A tree of this shape drawn as ``drawn`` says, and the draft's distribution of every node."""
    tokens: list[int] = []
    sources: list[Tensor] = []
    for node, parent in enumerate(shape.parents):
        source = draft(tuple(tokens[i] for i in shape.path(parent)))
        siblings = [tokens[i] for i in shape.children[parent + 1] if i < node]
        sources.append(source)
        if drawn is Drawing.DETERMINISTIC:
            tokens.append(source.argsort(descending=True, stable=True)[len(siblings)].item())
            continue
        left = source.clone()
        if drawn is Drawing.WITHOUT_REPLACEMENT:
            left[siblings] = 0
        tokens.append(script.token(-1, left / left.sum()))
    return TokenTree(tuple(tokens), shape, None, drawn), sources


def emitted(
    target: Model, draft: Model, shape: TreeShape, drawn: Drawing, rule: Drawing | None = None, length: int = 2
) -> Tensor:
    """Exact distribution of the first ``length`` tokens when one tree is drafted and verified (by ``rule`` if given)
    and plain decoding follows."""
    result = torch.zeros((target.vocab,) * length, dtype=torch.float64)

    def procedure(script: Script) -> tuple[int, ...]:
        tree, sources = draw_tree(draft, shape, drawn, script)
        tree = tree if rule is None else TokenTree(tree.token_ids, shape, None, rule)
        rows = torch.stack([target(path_tokens(tree, node)) for node in range(-1, len(tree))])
        tokens = verify(tree, rows, script, sources).tokens(tree)
        while len(tokens) < length:
            tokens = (*tokens, script.token(0, target(tokens)))
        return tokens[:length]

    for weight, tokens in outcomes(procedure):
        result[tokens] += weight
    return result


def wanted(target: Model, length: int = 2) -> Tensor:
    result = torch.ones((target.vocab,) * length, dtype=torch.float64)
    for tokens in product(range(target.vocab), repeat=length):
        for i in range(length):
            result[tokens] *= target(tokens[:i])[tokens[i]]
    return result


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


SHAPES = {
    "one node": fixed_widths((1,)),
    "chain": fixed_widths((1, 1)),
    "two by one": fixed_widths((2, 1)),
    "three": fixed_widths((3,)),
    "ragged": TreeShape((-1, -1, 0, 0)),
    "second child grows": TreeShape((-1, -1, 1)),
}


@pytest.mark.parametrize("drawn", list(Drawing))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("seed", range(2))
def test_emitted_distribution_is_the_target(drawn: Drawing, shape: TreeShape, seed: int) -> None:
    target, draft = Model(3, seed), Model(3, seed + 100, sharpness=2.0)
    assert total_variation(emitted(target, draft, shape, drawn), wanted(target)) < 1e-12


@pytest.mark.parametrize("drawn", list(Drawing))
def test_targets_with_impossible_tokens(drawn: Drawing) -> None:
    """After top-k and top-p the target has zeros; the draft may propose such tokens, and they must never come out."""
    for seed in range(4):
        target, draft = Model(4, seed, zeros=0.5), Model(4, seed + 50)
        result = emitted(target, draft, SHAPES["second child grows"], drawn)
        assert total_variation(result, wanted(target)) < 1e-12
        assert not result[wanted(target) == 0].any()


def test_drafts_with_impossible_tokens() -> None:
    """A draft restricted by top-k itself, as sampling drafts are: draws stay exact where it has no mass."""
    for seed in range(4):
        target, draft = Model(4, seed), Model(4, seed + 50, zeros=0.4)
        for drawn in (Drawing.DETERMINISTIC, Drawing.INDEPENDENT):
            assert total_variation(emitted(target, draft, SHAPES["two by one"], drawn), wanted(target)) < 1e-12
        assert (
            total_variation(emitted(target, draft, SHAPES["chain"], Drawing.WITHOUT_REPLACEMENT), wanted(target))
            < 1e-12
        )


@pytest.mark.parametrize("drawn", [Drawing.INDEPENDENT, Drawing.WITHOUT_REPLACEMENT])
def test_a_perfect_draft_is_always_accepted(drawn: Drawing) -> None:
    model = Model(4, 5)

    def procedure(script: Script) -> AcceptedPath:
        tree, sources = draw_tree(model, SHAPES["two by one"], drawn, script)
        return verify(
            tree, torch.stack([model(path_tokens(tree, node)) for node in range(-1, len(tree))]), script, sources
        )

    assert sum(weight for weight, accepted in outcomes(procedure) if len(accepted.path) == 2) == pytest.approx(
        1.0, abs=1e-12
    )


def test_wrong_pairings_are_detected() -> None:
    """The rule for i.i.d. children on top-k children is biased by about 0.3, and on children without replacement
    too: the enumeration can tell."""
    worst = 0.0
    for seed in range(6):
        target, draft = Model(4, seed), Model(4, seed + 9)
        wrong = emitted(target, draft, SHAPES["three"], Drawing.DETERMINISTIC, Drawing.INDEPENDENT, length=1)
        worst = max(worst, total_variation(wrong, wanted(target, 1)))
    assert 0.25 < worst < 0.6
    target, draft = Model(4, 3), Model(4, 3, sharpness=1.5)
    wrong = emitted(target, draft, SHAPES["three"], Drawing.WITHOUT_REPLACEMENT, Drawing.INDEPENDENT, length=1)
    assert total_variation(wrong, wanted(target, 1)) > 0.01
    with pytest.raises(ValueError, match="siblings repeat"):
        emitted(target, draft, SHAPES["three"], Drawing.INDEPENDENT, Drawing.WITHOUT_REPLACEMENT, length=1)


def test_several_drafts_one_distribution_per_child() -> None:
    """SpecInfer's setting: each child from a draft of its own."""
    target, drafts = Model(4, 1), [Model(4, 21), Model(4, 22)]
    result = torch.zeros(4, dtype=torch.float64)

    def procedure(script: Script) -> int:
        tree = TokenTree(
            tuple(script.token(-1, draft(())) for draft in drafts), fixed_widths((2,)), None, Drawing.INDEPENDENT
        )
        rows = torch.stack([target(path_tokens(tree, node)) for node in range(-1, 2)])
        return verify(tree, rows, script, [draft(()) for draft in drafts]).tokens(tree)[0]

    for weight, token in outcomes(procedure):
        result[token] += weight
    assert total_variation(result, target(())) < 1e-12


def test_follow_takes_the_matching_path_and_equals_verify() -> None:
    """The batched rule of the executor is the deterministic rule of `verify`."""
    tree = TokenTree((4, 5, 6, 7, 8), TreeShape((-1, -1, 0, 0, 3)))
    parents = (-1, *(parent + 1 for parent in tree.parents))
    query = QueryTokens(0, tree.query_tokens(1), 0, 0, SequencePages("gpu", ()), 1, parents)
    assert query.follow([4, 7, 0, 0, 8, 2]) == (1, 4, 5)
    assert query.follow([9, 7, 0, 0, 8, 2]) == ()
    assert query.paths == ((), (4,), (5,), (4, 6), (4, 7), (4, 7, 8))
    assert AcceptedPath((0, 3, 4), 2).tokens(tree) == (4, 7, 8, 2)
    for seed in range(40):
        choice = np.random.default_rng(seed).integers(4, 9, size=6)
        rows = torch.nn.functional.one_hot(torch.from_numpy(choice), 10).double()
        assert tuple(node + 1 for node in verify(tree, rows, Argmax()).path) == query.follow(choice.tolist())


class Argmax:
    def accept(self, depth: int, rank: int, probability: float) -> bool:
        raise AssertionError("a deterministic tree needs no coin")

    def token(self, depth: int, probabilities: Tensor) -> int:
        return int(probabilities.argmax())


def test_wrong_input_is_refused() -> None:
    rows = torch.full((2, 4), 0.25)
    with pytest.raises(ValueError, match="2 target distributions for a tree of 2 nodes: need 3"):
        verify(chain([1, 2]), rows, Argmax())
    drawn = TokenTree((1,), TreeShape((-1,)), None, Drawing.INDEPENDENT)
    with pytest.raises(ValueError, match="needs the draft's distribution"):
        verify(drawn, rows, Argmax())
    with pytest.raises(ValueError, match="token 1 cannot have been drawn"):
        verify(drawn, rows, Argmax(), [torch.tensor([1.0, 0, 0, 0])])
