"""Whether few tokens are multiplied with quantized weights in codes, or with what these are expanded to once a pass."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from flexbatch.policy.affine import point_of
from flexbatch.policy.cost import PassModel
from flexbatch.policy.expansion import most_in_codes
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.plan import as_met
from flexbatch.policy.policy import Policy
from flexbatch.policy.workload import Workload

ALIKE = 1e-9
"""Relative difference of seconds up to which two passes take the same time."""


@dataclass(frozen=True)
class FewTokensPass:
    """A decode pass of the fullest block whose tokens are few enough to be multiplied in codes."""

    seconds: float
    busiest_seconds: float
    """Of the host's launching and of the GPU, whichever takes longer: a link or a CPU may hide both."""

    def is_faster(self, other: FewTokensPass) -> bool:
        """Or as fast and less work for whichever of host and GPU has more."""
        if not math.isclose(self.seconds, other.seconds, rel_tol=ALIKE):
            return self.seconds < other.seconds
        return self.busiest_seconds < (1 - ALIKE) * other.busiest_seconds


def with_products_chosen(shape: ModelShape, hardware: Hardware, workload: Workload, policy: Policy) -> Policy:
    """The policy with `Policy.few_in_codes` by what takes less time, codes where both take the same.

    Codes are what there is to choose where nothing is quantized, without a GPU, and for a model that lies on the GPU
    whole and whose decode passes are graphs, for which launching does not count: those of several micro-batches and of
    stages of a pipeline are launched tick by tick.
    """
    codes, expanded = (dataclasses.replace(policy, few_in_codes=in_codes) for in_codes in (True, False))
    model = PassModel(shape, hardware, policy, PassLoad.decode(1, 1))
    if policy.weight_bits == 16 or hardware.device != "cuda" or (model.graphs and model.on_gpu(point_of(policy))):
        return codes
    of_codes, of_expanded = (few_tokens_pass(shape, hardware, workload, each) for each in (codes, expanded))
    return expanded if of_expanded.is_faster(of_codes) else codes


def few_tokens_pass(shape: ModelShape, hardware: Hardware, workload: Workload, policy: Policy) -> FewTokensPass:
    """See there. Larger blocks meet it when most of their last sequences have ended."""
    most = min(policy.block_size, most_in_codes(policy.num_gpu_batches))
    sequences = most if workload.num_sequences is None else min(most, workload.num_sequences)
    load = PassLoad.decode(sequences, workload.mean_prompt + workload.mean_output / 2)
    met = as_met(policy)
    model, point = PassModel(shape, hardware, met, load), point_of(met)
    busiest = max(float(model.launched(point)), float(model.resource_seconds(point)["gpu_compute"]))
    return FewTokensPass(float(model.pass_seconds(point)), busiest)
