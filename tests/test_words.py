"""Words that were replaced by those of the field stay replaced: names in the code say what vLLM's and FlexGen's readers
expect. A word is allowed in the files whose meaning of it stays."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.test_size import PRODUCT, files, name_of

WORDS: dict[str, tuple[str, dict[str, str]]] = {
    "home": ("tier or placement", {"kernels/native_cache.py": "the user's folder"}),
    "homes": ("tiers or placements", {}),
    "lane": ("transfer queue, or stream", {}),
    "lanes": (
        "transfer queues, or streams",
        {"kernels/native_sizes.py": "of a vector register", "kernels/native_experts.py": "of a vector register"},
    ),
    "room": (
        "package, or capacity",
        dict.fromkeys(
            ("flexbatch/memory/kvcache.py", "flexbatch/memory/window_pages.py", "flexbatch/planner/meshes.py"),
            "memory that is left",
        ),
    ),
    "rooms": ("packages", {}),
    "places": ("positions, offsets, indices or placements", {}),
    "retired": ("finished", {}),
    "settle": ("synchronize or apply", {}),
    "bring": ("copy_to_device", {}),
    "coin": ("uniform", {}),
    "coins": ("uniforms", {}),
    "chances": ("probabilities", {}),
    "judges": ("needs_verification", {}),
    "verdict": ("accepted path", {}),
    "spreader": ("balancer", {}),
    "suit": ("replan", {}),
    "suits": ("replan", {}),
    "exceeded": ("shortfall", {}),
    "crumb": ("a name that says what it bounds", {}),
    "mended": ("a name that says what it bounds", {}),
    "unlike": ("a name that says what it bounds", {}),
    "ladder": ("a name that says what it bounds", {}),
    "realise": ("rounding", {}),
    "dispenser": ("queue", {}),
    "claim": ("lease", {}),
    "claims": ("leases", {}),
}
"""Parts of names, as words: what stands for each today, and where it may stay with what meaning."""
CLASSES = {
    "Claim": "SlabLease",
    "Views": "TensorView",
    "Begun": "PendingTick",
    "Drawn": "SampledPass",
    "Verdict": "AcceptedPath",
    "Spreader": "TierBalancer",
    "Decisions": "EnginePlan",
    "Need": "MemoryRequirement",
    "Retired": "Completion",
    "Dispenser": "PartQueue",
    "Unit": "RowGroup",
}
NAMES = ("word_size", "hand_on", "send_on")


@cache
def bound_names() -> list[tuple[str, int, str, bool]]:
    """(file, line, name, whether a class) of all that product code gives a name to."""
    return [
        (name_of(path), *found)
        for path in files(*PRODUCT)
        for found in names_of(ast.parse(path.read_text(encoding="utf-8")))
    ]


def names_of(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.lineno, node.name, isinstance(node, ast.ClassDef)
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg, False
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id, False
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr, False


def words_of(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def test_words_are_found_in_names() -> None:
    assert words_of("cache_places") == {"cache", "places"} and words_of("HomeTier") == {"home", "tier"}
    assert words_of("PLACES") == {"places"} and words_of("_settle") == {"settle"} and "home" not in words_of("homepage")


@pytest.mark.parametrize("word", WORDS)
def test_no_name_has_a_word_that_was_replaced(word: str) -> None:
    instead, allowed = WORDS[word]
    found = [f"{path}:{line} {name}" for path, line, name, _ in bound_names() if word in words_of(name)]
    left = [where for where in found if where.split(":")[0] not in allowed]
    assert not left, f"{word} is {instead} now: {', '.join(left)}"
    assert all(any(where.startswith(f"{path}:") for where in found) for path in allowed), f"{word}: allowed for nothing"


def test_no_variable_is_a_place() -> None:
    """To place is what a plan does with weights; a slot, an index, an offset or a tier is where something is."""
    functions = {(path, name) for path, _, name, _ in bound_names() if name == "place"}
    variables = [
        f"{name_of(path)}:{node.lineno}"
        for path in files(*PRODUCT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == "place"
    ]
    assert functions and not variables, ", ".join(variables)


def test_no_class_or_name_is_an_old_one() -> None:
    classes = [f"{path}:{line} {name}" for path, line, name, is_class in bound_names() if is_class and name in CLASSES]
    assert not classes, f"{', '.join(classes)}: {CLASSES}"
    assert not (names := [f"{path}:{line} {name}" for path, line, name, _ in bound_names() if name in NAMES]), names
