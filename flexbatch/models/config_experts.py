"""What config.json files say of experts, in the spellings of all families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexbatch.models.config_keys import Config, given, optional, required
from flexbatch.models.expert_arch import Experts
from flexbatch.validation.errors import CheckpointError

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What the number of experts is called, by family and by version of transformers."""
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k")
"""And the number of those that a token goes to."""


def read_experts(config: Config, width: int, **fields: Any) -> Experts | None:
    """None where the file says that there are none."""
    name, chosen_name = given(config, *COUNTS), given(config, *CHOSEN)
    count, chosen = required(config, *COUNTS), required(config, *CHOSEN)
    if not count:
        return None
    if chosen > count:
        raise CheckpointError(f"config.json: {chosen_name}={chosen} must be at most {name}={count}")
    return Experts(count, chosen, width, **fields)


def read_groups(config: Config, group_best: int = 2) -> dict[str, int]:
    """The groups that experts are chosen from, checked by the names of the file. group_best: experts that a group is
    ranked by."""
    name = given(config, *COUNTS)
    count, chosen = required(config, *COUNTS), required(config, *CHOSEN)
    groups, best = optional(config, "n_group", 1), optional(config, "topk_group", 1)
    if groups == 1 and best == 1:
        return {}
    size = count // groups
    if count % groups or best > groups or size < group_best or chosen > best * size:
        raise CheckpointError(
            f"config.json: {name}={count} experts in n_group={groups} groups, of which topk_group={best} are chosen "
            f"from: groups must be alike, hold at least {group_best} experts each and together "
            f"num_experts_per_tok={chosen}"
        )
    return {"groups": groups, "top_groups": best, "group_best": group_best}


def in_layers(experts: Experts | None, sparse: Sequence[bool]) -> dict[str, Any]:
    """The experts, and the layers that have them."""
    if experts is None or not any(sparse):
        return {}
    return {"experts": experts, "sparse_layers": () if all(sparse) else tuple(sparse)}


def alike(config: Config, *names: str) -> Config:
    """The config with one number for each of these keys where the file lists one for every layer. Raises
    CheckpointError where they differ: all layers with experts are of one kind."""
    changed = {}
    for name in names:
        value = config.get(name)
        if isinstance(value, list | tuple):
            if len(set(value)) != 1:
                raise CheckpointError(
                    f"config.json: {name} gives layers different numbers, {sorted(set(value))}: they must be alike"
                )
            changed[name] = value[0]
    return {**config, **changed}


def expect(config: Config, **wanted: Any) -> None:
    """Raises CheckpointError for a key that asks for something else than the family computes. One that is left out,
    null or false asks for nothing."""
    for name, value in wanted.items():
        found = config.get(name)
        if found and found != value:
            raise CheckpointError(
                f"config.json: {name}={found!r} is not supported of model_type {config.get('model_type')!r}; "
                f"known: {value!r}"
            )


def read_corrected(config: Config, scale: float = 1.0, groups: Mapping[str, int] | None = None) -> Experts | None:
    """Experts chosen as in DeepSeek-V3: by sigmoids that a learned correction moves, in groups. scale, groups: where
    the file is silent."""
    width = required(config, "moe_intermediate_size")
    given_groups = {key: value for key, value in config.items() if value is not None}
    return read_experts(
        config,
        width,
        scoring="sigmoid",
        normalize=optional(config, "norm_topk_prob", True),
        normalize_eps=1e-20,
        scale=float(optional(config, "routed_scaling_factor", scale)),
        correction=True,
        float_router=True,
        shared_width=width * optional(config, "n_shared_experts", 1),
        **read_groups({**(groups or {}), **given_groups}),
    )
