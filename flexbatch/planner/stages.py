"""How the layers of a model are shared out among the stages of a pipeline: by what they cost."""

from __future__ import annotations

from collections.abc import Mapping

from flexbatch.memory.weight_plan import placed_tensor, tensor_format
from flexbatch.models.arch import Arch
from flexbatch.models.quantized.scheme import Form
from flexbatch.models.specs import weight_specs
from flexbatch.models.stage import RankStage, shared_out_by_cost
from flexbatch.policy.limits import weight_group


def stages_of(
    arch: Arch, count: int, bits: int, element_bytes: int, prequantized: Mapping[str, Form]
) -> tuple[RankStage, ...]:
    """The layers of every stage. A layer's cost is its share of the model's bytes, which have to lie somewhere and
    cross a link, and its share of the products of a token; embedding and head count as the first stage's. Raises
    ConfigurationError."""
    num_bytes, products = ([0.0] * (arch.num_layers + 2) for _ in range(2))
    group = weight_group(arch.hidden_size)
    for spec in weight_specs(arch):
        form = tensor_format(spec, bits, group, prequantized)
        num_bytes[spec.layer] += placed_tensor(spec, "gpu", form, element_bytes).num_bytes
        used = 1.0 if spec.layer >= 0 or (spec.role == "embed.weight" and arch.tie_word_embeddings) else 0.0
        if spec.role.startswith("experts.") and arch.experts is not None:
            used = arch.experts.top_k / arch.experts.count
        products[spec.layer] += used * spec.numel
    # The head is the last but one, and layer -1, the embedding, the last.
    cost = [b / sum(num_bytes) + p / sum(products) for b, p in zip(num_bytes, products, strict=True)]
    return tuple(shared_out_by_cost(cost[-1] + cost[-2], cost[: arch.num_layers], count))
