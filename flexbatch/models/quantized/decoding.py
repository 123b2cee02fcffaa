"""Assigned matrices in codes -> pieces: in codes where a store holds what the file does, else in numbers."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.models.arch import Arch
from flexbatch.models.assignment import Assignment
from flexbatch.models.families import FAMILIES, source_names
from flexbatch.models.quantized.config import Quantization
from flexbatch.models.quantized.scheme import Form, QuantizedPiece
from flexbatch.models.quantized.words import in_order
from flexbatch.models.source import read_tensors
from flexbatch.models.source_rows import class_of, rows_of
from flexbatch.models.specs import Piece, weight_specs
from flexbatch.validation.errors import CheckpointError

logger = logging.getLogger("flexbatch")

CHUNK_BYTES = 32 << 20
"""Of float32, expanded at a time."""
LEAST_GROUP = 8
"""Inputs. Groups of one role that have no larger common divisor are not worth their scales."""
ORDERS = ("g_idx", "weight_g_idx")
"""Tensors that put inputs into groups out of their order."""

Blocks = Callable[[Assignment, Tensor], Iterator[tuple[slice | None, tuple[Tensor, ...]]]]
"""A tensor whose rows are those of a stored matrix -> canonical rows, with the part of the tensor that fills them."""


def formats(assignments: Sequence[Assignment], arch: Arch) -> dict[str, Form]:
    """The form by role of the layers' matrices that a store holds as they are, in every layer."""
    return _by_role(assignments, forms_of(assignments), arch)


def _by_role(assignments: Sequence[Assignment], forms: Sequence[Form | None], arch: Arch) -> dict[str, Form]:
    found: dict[str, set[Form | None]] = {}
    for a, form in zip(assignments, forms, strict=True):
        if 0 <= a.spec.layer < arch.num_layers and len(a.spec.shape) == 2:
            found.setdefault(a.spec.role, set()).add(form)
    return {role: common for role, forms in found.items() if (common := _common(forms)) is not None}


def planned_formats(quantization: Quantization, arch: Arch) -> dict[str, Form]:
    """The same without the files: every matrix that the configuration means is taken to be stored as it says."""
    # The first layer, and the first with experts: all others are like one of them.
    layers = {0, *[layer for layer in range(arch.num_layers) if arch.experts_of(layer)][:1]}
    shapes = {(spec.layer, spec.role): spec for spec in weight_specs(arch) if len(spec.shape) == 2}
    found: dict[str, set[Form | None]] = {}
    for name, (layer, row, suffix) in source_names(arch).items():
        if layer not in layers or not (suffix == ".weight" or row.says("stacked")):
            continue
        names = {prefix + name.removesuffix(suffix) for prefix in (*FAMILIES[arch.family].prefixes, "")}
        scheme = quantization.scheme_of(names, class_of(row))
        for each in rows_of(row, arch):
            spec = shapes.get((layer, each.role + suffix))
            if spec is not None:
                kept = scheme is not None and not getattr(scheme, "reorders", False)
                form = scheme.form(*Assignment({}, spec, each).sizes) if kept and scheme is not None else None
                found.setdefault(spec.role, set()).add(form)
    return {role: common for role, forms in found.items() if (common := _common(forms)) is not None}


def _common(forms: set[Form | None]) -> Form | None:
    """A form that holds all of them."""
    known = [form for form in forms if form is not None]
    if len(known) < len(forms):
        return None
    if any(form.floats for form in known):
        return known[0] if len(set(known)) == 1 else None
    form = Form(max(form.bits for form in known), math.gcd(*(form.group for form in known)))
    return form if form in known or form.group >= LEAST_GROUP else None


def forms_of(assignments: Sequence[Assignment]) -> list[Form | None]:
    """Of each matrix. Reads nothing but the order of its inputs, where the files have one."""
    forms = [None if a.scheme is None else a.scheme.form(*a.sizes) for a in assignments]
    orders = [
        (index, a.stored[name])
        for index, a in enumerate(assignments)
        for name in ORDERS
        if forms[index] is not None and name in a.stored
    ]
    values = read_tensors(stored for _, stored in orders)
    for (index, _), (_, value) in zip(orders, values, strict=True):
        if not in_order(value, _stored_group(assignments[index])):
            forms[index] = None
    return forms


def _stored_group(assignment: Assignment) -> int:
    """Inputs that share a scale in the file."""
    scheme, columns = assignment.scheme, assignment.sizes[1]
    grids = getattr(scheme, "grids", None)
    group: int = grids[0].columns if grids else getattr(scheme, "group", 0)
    return group or columns


def pieces(
    assignment: Assignment, parts: dict[str, Tensor], packed: bool, blocks: Blocks
) -> Iterator[Piece | QuantizedPiece]:
    """The matrix of an assignment, or those of its experts one by one; with ``packed`` in codes. Raises CheckpointError
    that names the matrix."""
    if assignment.source_experts is None:
        yield from _pieces(assignment, parts, packed, blocks)
        return
    rows = assignment.sizes[0]

    def in_place(index: int, _: Assignment, tensor: Tensor) -> Iterator[tuple[slice | None, tuple[Tensor, ...]]]:
        placed = gates_first(tensor, 0) if assignment.row.says("pairs") else tensor
        yield slice(index * rows, (index + 1) * rows), (placed,)

    for index, expert in enumerate(range(assignment.source_experts.start, assignment.source_experts.stop)):
        own = {suffix: tensor[expert] for suffix, tensor in parts.items()}
        yield from _pieces(assignment, own, packed, partial(in_place, index))


def gates_first(tensor: Tensor, dim: int) -> Tensor:
    """Gates and ups that take turns along a dimension, as all gates and then all ups."""
    gates, ups = tensor.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return torch.cat([gates, ups], dim)


def _pieces(
    assignment: Assignment, parts: dict[str, Tensor], packed: bool, blocks: Blocks
) -> Iterator[Piece | QuantizedPiece]:
    scheme, spec, (rows, columns) = assignment.scheme, assignment.spec, assignment.sizes
    assert scheme is not None
    if packed:
        form = scheme.form(rows, columns)
        assert form is not None
        with _naming(assignment):
            codes, parameters = scheme.codes(parts, rows, columns)
        for (target, (part,)), (_, (scales,)) in zip(
            blocks(assignment, codes), blocks(assignment, parameters), strict=True
        ):
            yield QuantizedPiece(spec.layer, spec.role, target, part, scales, *form)
        return
    with _naming(assignment):
        read = scheme.numbers(parts, rows, columns)
    step = max(1, CHUNK_BYTES // (4 * columns))
    for target, (index,) in blocks(assignment, torch.arange(rows)):
        first = 0 if target is None else target.start
        for start in range(0, len(index), step):
            some = index[start : start + step]
            target_rows = slice(first + start, first + start + len(some))
            yield Piece(spec.layer, spec.role, target_rows, read(some), from_codes=True)


@contextmanager
def _naming(assignment: Assignment) -> Iterator[None]:
    """What is wrong with the tensors of a matrix is said with its name and file."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        file = next(iter(assignment.stored.values())).file
        raise CheckpointError(f"{file}: {assignment.module}: {error}") from error


def summary(assignments: Iterable[Assignment], kept: Collection[str]) -> str:
    """How many matrices of each kind are kept, by their roles, and how many are expanded."""
    coded = [a for a in assignments if a.scheme is not None]
    return kept_and_expanded(
        Counter(str(a.scheme) for a in coded if a.spec.role in kept),
        Counter(str(a.scheme) for a in coded if a.spec.role not in kept),
    )


def kept_and_expanded(kept: Counter[str], expanded: Counter[str]) -> str:
    def counted(kinds: Counter[str]) -> str:
        return ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common()) or "none"

    return (
        f"{counted(kept)} kept in codes as they are, {counted(expanded)} expanded once and stored at --weight-bits "
        "(embedding and head in the compute dtype)"
    )


def note(folder: Path, quantization: Quantization, assignments: Sequence[Assignment], arch: Arch) -> dict[str, Form]:
    """`formats`, and lines of the log for what is kept and expanded, and done otherwise than by the format's own
    runtime."""
    forms = forms_of(assignments)
    kept = _by_role(assignments, forms, arch)
    logger.info("%s: %s", folder, summary(assignments, kept))
    for text in quantization.notes:
        logger.info("%s: %s", folder, text)
    layers: dict[str, tuple[set[int], set[int]]] = {}
    for a, form in zip(assignments, forms, strict=True):
        if 0 <= a.spec.layer < arch.num_layers and len(a.spec.shape) == 2 and a.spec.role not in kept:
            layers.setdefault(a.spec.role, (set(), set()))[form is None].add(a.spec.layer)
    for role, (fit, unfit) in layers.items():
        if fit and unfit:
            logger.warning(
                "%s: all layers have one form, so %s is expanded in all %d: layers %s have it in codes that a store "
                "holds, but layers %s have not",
                folder, role, arch.num_layers, _range(sorted(fit)), _range(sorted(unfit)),
            )  # fmt: skip
    return kept


def _range(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:6])) + (f" and {len(layers) - 6} more" if len(layers) > 6 else "")
