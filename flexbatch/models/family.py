"""What one row of the table of families holds, and what most rows have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flexbatch.models.arch import Arch
from flexbatch.models.config_types import KEYS, Rule, or_list
from flexbatch.models.module_names import LLAMA_OUTER, LLAMA_ROWS, ModuleMapping


@dataclass(frozen=True)
class Family:
    """One row of the table. read: config -> Arch. prefixes: what may stand before the names of the base model, longest
    first. blocks: what stands before a layer's number. defaults: values of transformers' configuration class that files
    may leave out. skip: further tensors of the files that are not part of the text model. expert_keys: of a family with
    experts, the keys about them that its reader knows. listed_keys: keys that may list a number for every layer."""

    read: Callable[[dict[str, Any]], Arch]
    prefixes: tuple[str, ...]
    blocks: str
    block_rows: tuple[ModuleMapping, ...]
    outer_rows: tuple[ModuleMapping, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    skip: re.Pattern[str] | None = None
    expert_keys: frozenset[str] = frozenset()
    listed_keys: tuple[str, ...] = ()

    @property
    def rules(self) -> dict[str, Rule]:
        """What the keys of its files may hold."""
        return KEYS | {key: or_list(KEYS[key]) for key in self.listed_keys}


def expert_keys(*names: str) -> frozenset[str]:
    """Keys about experts, with those that nearly all families have."""
    return frozenset({"num_experts", "num_local_experts", "num_experts_per_tok", *names})


def special(eos: int | list[int] | None, bos: int | None, **more: Any) -> dict[str, Any]:
    return {"eos_token_id": eos, "bos_token_id": bos, **more}


def llama_family(
    read: Callable[[dict[str, Any]], Arch],
    defaults: dict[str, Any],
    rows: tuple[ModuleMapping, ...] = LLAMA_ROWS,
    **changes: Any,
) -> Family:
    return Family(
        read,
        **{
            "defaults": defaults,
            "prefixes": ("model.", ""),
            "blocks": "layers",
            "block_rows": rows,
            "outer_rows": LLAMA_OUTER,
            **changes,
        },
    )
