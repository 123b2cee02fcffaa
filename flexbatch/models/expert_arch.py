"""A mixture of experts as data: how many, how a token chooses among them, and what runs beside them."""

from __future__ import annotations

from dataclasses import dataclass

from flexbatch.policy.limits import expert_workspace_elements, units_of_experts

SCORINGS = ("softmax", "softmax_of_chosen", "sigmoid", "sparsemixer")


@dataclass(frozen=True)
class Experts:
    """The experts of a sparse layer: ``count`` gated MLPs of ``width``, of which a router gives each token ``top_k``.

    scoring: "softmax" over all experts before the best are taken, "softmax_of_chosen" over the best alone, "sigmoid" of
    each, or "sparsemixer" (Liu et al. 2024, "GRIN", section 2: two experts one after the other, each weighed by a
    softmax over the scores within ``margin`` of the best). normalize: the weights of the chosen are divided by their
    sum plus ``normalize_eps``, or by ``normalize_least`` where the sum is less; ``normalize_power``: by the p-norm of
    this p in the place of the sum. scale: multiplies them afterwards. scales_input: they multiply what an expert is
    given, not what it gives. correction: a bias for each expert that is added for
    the choice and left out of the weights. groups: the experts form as many groups of neighbors, and only the
    ``top_groups`` with the largest sum of their ``group_best`` best scores are chosen from. float_router: router and
    correction are kept and multiplied in float32. shared_width: of a gated MLP that every token goes through as well,
    0: none; ``shared_gate``: its output is multiplied by the sigmoid of one more product; ``shared_bias``: its matrices
    have biases. router_bias, bias: whether the router and the experts' matrices have biases. clamp: limit of gates and
    ups, 0: none; then an expert computes (up + 1) * gate * sigmoid(``gain`` * gate) in the place of the model's
    activation.
    """

    count: int
    top_k: int
    width: int
    scoring: str = "softmax"
    normalize: bool = False
    normalize_eps: float = 0.0
    normalize_least: float = 0.0
    normalize_power: float = 1.0
    scale: float = 1.0
    scales_input: bool = False
    margin: float = 0.0
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    float_router: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    bias: bool = False
    clamp: float = 0.0
    gain: float = 1.0
    shared_bias: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or self.width < 1:
            raise ValueError(f"{self.count} experts of width {self.width}: both must be at least 1")
        if not 1 <= self.top_k <= self.count:
            raise ValueError(f"top_k={self.top_k} must be between 1 and the number of experts, {self.count}")
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring={self.scoring!r} must be one of {', '.join(SCORINGS)}")
        if self.scoring == "sparsemixer" and (self.top_k != 2 or self.count < 2):
            raise ValueError(f"top_k={self.top_k} of {self.count} experts: the sparse mixer takes 2 of at least 2")
        if self.count % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"{self.count} experts cannot form {self.groups} groups of which {self.top_groups} are chosen from"
            )
        if self.groups > 1 and (
            self.count // self.groups < self.group_best or self.top_k > self.top_groups * self.count // self.groups
        ):
            raise ValueError(
                f"{self.groups} groups of {self.count // self.groups} experts, {self.top_groups} of them chosen from: "
                f"groups are ranked by their {self.group_best} best experts, and must hold the top_k={self.top_k}"
            )

    @property
    def units(self) -> list[tuple[int, int]]:
        """(first expert, number of experts) of what is placed together."""
        return units_of_experts(self.count)

    def workspace_elements(self, hidden_size: int) -> int:
        """Intermediate results of one token, at most."""
        return expert_workspace_elements(hidden_size, self.top_k, self.width, self.shared_width)
