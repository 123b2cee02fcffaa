"""The quantization_config of compressed-tensors: groups of modules, each with its own scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexbatch.models.config_types import FLAG, MAX_INNER, NAMES, OBJECT, TEXT, Rule, check_keys, whole
from flexbatch.models.quantized.grids import ROW, TENSOR, Floats, Grid, Integers
from flexbatch.models.quantized.scheme import Scheme
from flexbatch.validation.errors import CheckpointError

METHOD = "compressed-tensors"
PACKED_FORMAT = "pack-quantized"
FORMATS = (PACKED_FORMAT, "int-quantized", "float-quantized", "naive-quantized")
DENSE_FORMATS = ("dense", "fakequant")
"""Of weights that were not compressed: they are plain numbers."""
BLOCK = Rule(
    "two whole numbers, the rows and columns of a block",
    lambda value: (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(type(size) is int and 1 <= size <= MAX_INNER for size in value)
    ),
)
WIDE = "activations are computed in the compute dtype, where its own runtime quantizes them as well"
CACHE = "the cache is stored at --cache-bits, whatever kv_cache_scheme says"
CONFIG: dict[str, Rule] = {
    "format": TEXT,
    "quantization_status": TEXT,
    "config_groups": OBJECT,
    "ignore": NAMES,
    **dict.fromkeys(("kv_cache_scheme", "sparsity_config", "transform_config"), OBJECT),
}
GROUP: dict[str, Rule] = {
    "targets": NAMES,
    **dict.fromkeys(("weights", "input_activations", "output_activations"), OBJECT),
    "format": TEXT,
}
WEIGHTS: dict[str, Rule] = {
    "num_bits": whole(1, 64),
    **dict.fromkeys(("type", "strategy"), TEXT),
    "symmetric": FLAG,
    "group_size": whole(-1, MAX_INNER),
    "block_structure": BLOCK,
    "actorder": Rule("a string, true or false", lambda value: isinstance(value, bool | str)),
}

Found = tuple[tuple[tuple[tuple[str, ...], Scheme], ...], tuple[str, ...], tuple[str, ...]]


def read(values: Mapping[str, Any]) -> Found:
    """Schemes with their targets, what is ignored, and notes. Raises CheckpointError that names the key."""
    check_keys(values, CONFIG, "quantization_config.")
    sparsity, transform = values.get("sparsity_config") or {}, values.get("transform_config") or {}
    if str(sparsity.get("format") or "dense") != "dense":
        raise refused("sparsity_config.format", sparsity["format"], "dense")
    if transform.get("config_groups"):
        raise refused(
            "transform_config", ", ".join(transform["config_groups"]), "weights without transforms of activations"
        )
    ignore, form = tuple(values.get("ignore") or ()), str(values.get("format") or "dense")
    schemes = []
    notes = [CACHE] if values.get("kv_cache_scheme") else []
    for name, group in (values.get("config_groups") or {}).items():
        within = f"config_groups.{name}"
        if not isinstance(group, dict):
            raise refused(within, group, "an object with targets and weights")
        check_keys(group, GROUP, f"quantization_config.{within}.")
        if not group.get("weights"):
            continue
        if group.get("input_activations") and WIDE not in notes:
            notes.append(WIDE)
        own = str(group.get("format") or form)
        if own not in DENSE_FORMATS:
            schemes.append((tuple(group.get("targets") or ()), scheme_of(group["weights"], own, within)))
    return tuple(schemes), ignore, tuple(notes)


def refused(key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization_config.{key}: {value!r:.120} is not supported; supported: {wanted}. Take the model "
        "before it was quantized, with --weight-bits 4 or 8, or a checkpoint in another format"
    )


def scheme_of(weights: Mapping[str, Any], form: str, within: str) -> Scheme:
    """Raises CheckpointError."""
    if form not in FORMATS:
        raise refused(f"{within}.format" if form == "mixed-precision" else "format", form, ", ".join(FORMATS))
    check_keys(weights, WEIGHTS, f"quantization_config.{within}.weights.")
    bits, kind = weights.get("num_bits") or 8, str(weights.get("type") or "int").lower()
    grid = grid_of(weights, within)
    if kind == "float":
        if bits != 8 or form == PACKED_FORMAT:
            raise refused(f"{within}.weights", f"{form} of {bits}-bit floats", "8-bit floats, not packed")
        return Floats((grid,))
    packed = form == PACKED_FORMAT
    known = (2, 4, 8) if packed else tuple(range(2, 9))
    if kind != "int" or bits not in known:
        raise refused(
            f"{within}.weights",
            f"{form} of {kind} with {bits} bits",
            f"int with {', '.join(map(str, known))} bits, float with 8",
        )
    symmetric, order = weights.get("symmetric"), weights.get("actorder")
    reorders = packed and grid.columns > 0 and (order is True or str(order).lower() in ("group", "dynamic"))
    return Integers((grid,), bits=bits, packed=packed, symmetric=symmetric is None or symmetric, reorders=reorders)


def grid_of(weights: Mapping[str, Any], within: str) -> Grid:
    """What shares a scale. Raises CheckpointError."""
    group = weights.get("group_size")
    guessed = "tensor" if group is None else "group" if group > 0 else "channel"
    strategy = str(weights.get("strategy") or guessed).lower()
    if strategy == "group" and group and group > 0:
        return Grid(1, group)
    if strategy == "block" and weights.get("block_structure"):
        return Grid(*weights["block_structure"])
    if strategy in ("tensor", "channel"):
        return TENSOR if strategy == "tensor" else ROW
    raise refused(
        f"{within}.weights.strategy", strategy, "tensor, channel, group with its group_size, block with its "
        "block_structure"
    )  # fmt: skip
