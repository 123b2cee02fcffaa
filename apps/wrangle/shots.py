"""Few-shot selection: written by hand, drawn at random, or one from each cluster of the model's own mistakes."""

from __future__ import annotations

import ast
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from flexbatch.apps.wrangle.examples import Example
from flexbatch.apps.wrangle.tables import TableError
from flexbatch.text.files import read_text
from flexbatch.validation.errors import reason

Manual = str | dict[str, str]
"""The examples as text; or for every value of the data set's group column, its text."""


def prompt(shots: str, example: Example, instruction: str = "") -> str:
    """Returns shots, an empty line, and the row, without white space at the end (a model continues words badly after
    a space)."""
    text = f"{shots}\n{example.text}".strip()
    return f"{instruction} {text}" if instruction else text


def join_shots(examples: Sequence[Example]) -> str:
    return "\n\n".join(example.shot for example in examples) + "\n" if examples else ""


def random_shots(train: Sequence[Example], count: int, seed: int, *, balanced: bool = False) -> list[Example]:
    """Returns ``count`` training examples; ``balanced`` draws as many of every answer as the rarest has. Raises
    TableError when there are too few."""
    draw = random.Random(seed)
    pool = list(train)
    if balanced:
        by_label: dict[str, list[Example]] = defaultdict(list)
        for example in train:
            by_label[example.label].append(example)
        least = min((len(examples) for examples in by_label.values()), default=0)
        pool = [example for examples in by_label.values() for example in draw.sample(examples, least)]
    if count > len(pool):
        raise TableError(
            f"{count} shots asked for, and the training split has "
            f"{len(pool)}{' after balancing' if balanced else ''}; lower --shots"
        )
    return draw.sample(pool, count)


def cluster_shots(validation: Sequence[Example], wrong: Sequence[bool], count: int, seed: int) -> list[Example]:
    """Clusters the mistakes on the validation split by their text into ``count`` groups; returns the example nearest to
    each center.

    Where all chosen examples have one of two answers, the last gives way to the mistake, else the example, of
    the other answer that is nearest to its center: a prompt that knows only Yes teaches Yes. Texts are compared by
    TF-IDF of character triples; needs scikit-learn. Without ``count`` mistakes, the examples that are nearest to
    mistakes fill up. Raises TableError.
    """
    if count > len(validation):
        raise TableError(f"{count} shots asked for, and the validation split has {len(validation)}; lower --shots")
    if not count:
        return []
    try:
        import numpy
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ModuleNotFoundError as problem:
        raise TableError("--select clusters needs scikit-learn: pip install 'flexbatch[wrangle]'") from problem
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3)).fit_transform(
        [example.text for example in validation]
    )
    errors = [index for index, is_wrong in enumerate(wrong) if is_wrong]
    pool = errors if len(errors) >= count else list(range(len(validation)))
    centers = KMeans(count, random_state=seed, n_init=4).fit(vectors[pool])
    distances = numpy.asarray(centers.transform(vectors))  # [examples, clusters]
    chosen: list[int] = []
    for cluster in range(count):
        free = [index for index in pool if index not in chosen]
        chosen.append(
            min(free, key=lambda index: (not wrong[index] and len(errors) < count, distances[index, cluster], index))
        )
    labels = {validation[index].label for index in chosen}
    others = [
        index
        for index, example in enumerate(validation)
        if example.label not in labels and example.label in ("Yes\n", "No\n")
    ]
    if len(labels) == 1 and others and count > 1:
        chosen[-1] = min(others, key=lambda index: (not wrong[index], distances[index, count - 1], index))
    return [validation[index] for index in chosen]


def read_manual(path: Path, data_set: str) -> Manual:
    """Reads hand-written shots: a text file, a JSON file with a text or a text for every group, or the authors'
    ``constants.py``.

    The Python file is parsed, never executed: its ``PREFIXES`` dictionary holds the paper's shots by data set.
    Raises TableError.
    """
    try:
        content = read_text(path).replace("\r\n", "\n")
    except OSError as problem:
        raise TableError(f"hand-written shots cannot be read: {reason(problem)}; give --manual FILE") from problem
    if path.suffix == ".py":
        return _from_constants(path, content, data_set)
    if path.suffix != ".json":
        return content
    try:
        found = json.loads(content)
    except ValueError as problem:
        raise TableError(f"{path} is no JSON: {problem}") from problem
    if isinstance(found, str) or (isinstance(found, dict) and all(isinstance(text, str) for text in found.values())):
        return found
    raise TableError(f"{path} must hold a text, or an object from group values to texts")


def _from_constants(path: Path, content: str, data_set: str) -> Manual:
    for statement in ast.parse(content).body:
        if (
            not isinstance(statement, ast.Assign)
            or not isinstance(statement.value, ast.Dict)
            or ast.unparse(statement.targets[0]) != "PREFIXES"
        ):
            continue
        for key, value in zip(statement.value.keys, statement.value.values, strict=True):
            ending = key.values[-1] if isinstance(key, ast.JoinedStr) and key.values else key
            if isinstance(ending, ast.Constant) and str(ending.value).rsplit("/", 1)[-1] == data_set:
                return ast.literal_eval(value)
    raise TableError(f"{path} has no PREFIXES entry for {data_set}")


def manual_shots(manual: Manual, example: Example) -> str:
    """Returns the shots for one example. Raises TableError for a group without shots."""
    if isinstance(manual, str):
        return manual
    group = example.group or "nan"
    if group not in manual:
        raise TableError(f"no hand-written shots for {group!r}; there are some for {', '.join(sorted(manual))}")
    return manual[group]
