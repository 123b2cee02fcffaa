"""The experts of a layer as the kernels take them: what lies where, in codes where it is stored in codes."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor

from flexbatch.kernels.expert_codes import CodeForm, ExpertCodes, ExpertStacks, Matrices, stacks_of
from flexbatch.memory.tensor_views import TensorView
from flexbatch.models.expert_arch import Experts
from flexbatch.models.specs import expert_role


def layer_stacks(
    experts: Experts,
    views: Mapping[str, TensorView],
    dense: Mapping[str, Tensor],
    in_codes: Container[tuple[int, str]],
) -> tuple[ExpertStacks, ExpertStacks]:
    """Gate and up, and down of all experts. dense: those that are in none of the codes ``in_codes``."""
    gate_up, down = (
        stacks_of(
            [
                (first, matrices(count, views[f"{expert_role(first, name)}.weight"], dense, in_codes))
                for first, count in experts.units
            ]
        )
        for name in ("gate_up", "down")
    )
    return gate_up, down


def matrices(
    count: int, view: TensorView, dense: Mapping[str, Tensor], in_codes: Container[tuple[int, str]]
) -> Matrices:
    """Those of so many experts that were placed as one tensor."""
    spec, form = view.placed.spec, view.placed.form
    if (spec.layer, spec.role) not in in_codes:
        return dense[spec.role].unflatten(0, (count, -1))
    assert view.codes is not None and view.parameters is not None
    codes, parameters = (each.unflatten(0, (count, -1)) for each in (view.codes, view.parameters))
    return ExpertCodes(codes, parameters, spec.shape[1], CodeForm(*form))
