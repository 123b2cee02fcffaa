"""Rotary entries of config.json in both generations: ``rope_parameters`` (transformers 5), and ``rope_scaling`` beside
``rope_theta`` (before)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexbatch.models.arch import RopeScaling
from flexbatch.models.config_keys import Config, optional, required
from flexbatch.models.config_types import MAX_TOKENS, ROPE_KEYS, check_keys
from flexbatch.validation.errors import CheckpointError

KINDS = {
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor",),
}
"""Keys without which transformers does not build the rotation."""
PASSED_ON = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor",),
}


@dataclass(frozen=True)
class Entry:
    """One rotary entry. name: where it stands in the file. whole: its families always rotate whole heads. nested: it is
    one of several by layer type."""

    name: str
    values: Config
    whole: bool = False
    nested: bool = False


def entry_of(config: Config, whole: bool = False) -> Entry:
    """The entry that counts: where a file has both generations, ``rope_scaling`` takes the place of
    ``rope_parameters``, with all that this holds."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    entry = Entry(name, dict(config.get(name) or {}), whole)
    check_keys(entry.values, ROPE_KEYS, f"{name}.")
    for kind in ("full_attention", "sliding_attention"):
        if entry.values.get(kind) is not None:
            raise CheckpointError(
                f"config.json: {name}.{kind}: model_type {config['model_type']!r} has one rotation for all "
                "layers, not one for each type"
            )
    return entry


def entries_by_layer_type(config: Config) -> tuple[Entry, Entry]:
    """(full, sliding) of a family whose layer types rotate by entries of their own; ``rope_scaling`` adds to that of
    full attention."""
    nested = config.get("rope_parameters")
    check_keys(nested or {}, ROPE_KEYS, "rope_parameters.")
    check_keys(config.get("rope_scaling") or {}, ROPE_KEYS, "rope_scaling.")
    full = {"rope_type": "default"} if nested is None else dict(nested.get("full_attention") or {})
    full |= config.get("rope_scaling") or {}
    sliding = dict((nested or {}).get("sliding_attention") or {})
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters.full_attention"
    entries = (
        Entry(name, full, whole=True, nested=True),
        Entry("rope_parameters.sliding_attention", sliding, whole=True, nested=True),
    )
    for entry in entries:
        check_keys(entry.values, ROPE_KEYS, f"{entry.name}.")
    return entries


def read_rope(
    config: Config, head_dim: int, *, theta: float = 10000.0, fraction: float = 1.0, entry: Entry | None = None
) -> dict[str, Any]:
    """Rotary fields and the context length. theta, fraction: what stands beside the entry or is the family's own; the
    entry's own win.

    "linear" and "dynamic" leave max_position_embeddings at the trained context, so the usable one is the factor times
    longer; "yarn" may. Where entries go by
    layer type it is the whole context.
    """
    entry = entry_of(config) if entry is None else entry
    positions = required(config, "max_position_embeddings", "n_positions")
    rope_theta = float(optional(entry.values, "rope_theta", theta))
    rotary_dim = _rotary_dim(entry, head_dim, float(optional(entry.values, "partial_rotary_factor", fraction)))
    scaling = read_scaling(config, entry, positions, rotary_dim, rope_theta)
    return {
        "rope_theta": rope_theta,
        "rotary_dim": rotary_dim,
        "rope_scaling": scaling,
        "max_positions": _context(entry, scaling, positions),
    }


def _kind(entry: Entry) -> str:
    return str(entry.values.get("rope_type") or entry.values.get("type") or "default")


def _rotary_dim(entry: Entry, head_dim: int, share: float) -> int:
    if entry.whole:
        if share != 1 and _kind(entry) != "default":
            raise CheckpointError(
                f"config.json: partial_rotary_factor={share} with {entry.name} of type {_kind(entry)!r}: this "
                "family rotates whole heads"
            )
        share = 1.0
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        raise CheckpointError(
            f"config.json: rotary_dim={dim} must be even and at least 2; it is partial_rotary_factor={share:g} "
            f"of head_dim={head_dim} "
            "(by default hidden_size / num_attention_heads)"
        )
    return dim


def read_scaling(config: Config, entry: Entry, positions: int, rotary_dim: int, theta: float) -> RopeScaling | None:
    """The extension of the context, None without one. Raises CheckpointError for what transformers does not build,
    too."""
    name, rope, kind = entry.name, entry.values, KINDS.get(_kind(entry))
    if _kind(entry) == "default":
        return None
    if kind is None:
        key = "rope_type" if rope.get("rope_type") else "type"
        raise CheckpointError(
            f"config.json: {name}.{key}: rope scaling {_kind(entry)!r} is unknown; known: linear, dynamic, "
            "llama3, yarn, longrope"
        )
    for key in NEEDED.get(kind, ()):
        if rope.get(key) is None:
            raise CheckpointError(f"config.json: {name} of type {kind!r} lacks {key}")
    if kind == "yarn" and "factor" not in rope:
        raise CheckpointError(f"config.json: {name} of type 'yarn' lacks factor")
    # The trained context beside the entry counts more than that in it; one entry of several has its own.
    outer = None if entry.nested else config.get("original_max_position_embeddings")
    original = (
        positions
        if kind in ("linear", "dynamic")
        else int(outer or rope.get("original_max_position_embeddings") or positions)
    )
    # transformers looks for truncate beside the entries by layer type, where it never stands.
    passed_on = [key for key in PASSED_ON.get(kind, ()) if not (key == "truncate" and entry.nested)]
    passed: dict[str, Any] = {
        key: rope[key] if key == "truncate" else float(rope[key]) for key in passed_on if rope.get(key) is not None
    }
    scaling = RopeScaling(
        kind,
        float(optional(rope, "factor", positions / original)),
        original,
        short_factor=tuple(float(factor) for factor in rope["short_factor"]) if kind == "longrope" else (),
        **passed,
    )
    _check_scaling(name, scaling, rotary_dim, theta)
    return scaling


def _check_scaling(name: str, scaling: RopeScaling, rotary_dim: int, theta: float) -> None:
    """What the formulas divide by is not zero."""
    if scaling.kind == "longrope" and len(scaling.short_factor) != rotary_dim // 2:
        wanted = f"one for each of {rotary_dim // 2} rotated pairs (half of partial_rotary_factor x head_dim)"
        raise CheckpointError(
            f"config.json: {name}.short_factor has {len(scaling.short_factor)} numbers, wanted {wanted}"
        )
    if scaling.kind == "longrope" and scaling.original_positions < 2:
        raise CheckpointError(
            "config.json: original_max_position_embeddings or max_position_embeddings of 1 token cannot be extended"
        )
    if scaling.kind == "llama3" and scaling.low_freq_factor == scaling.high_freq_factor:
        raise CheckpointError(
            f"config.json: {name}.low_freq_factor and high_freq_factor are both {scaling.low_freq_factor:g}; "
            "there must be a range between"
        )
    if scaling.kind == "yarn" and theta == 1:
        raise CheckpointError(f"config.json: rope_theta=1 with {name} of type 'yarn': its logarithm is divided by")
    if scaling.kind == "dynamic" and rotary_dim == 2:
        raise CheckpointError(
            f"config.json: {name} of type 'dynamic' needs more than one rotated pair (partial_rotary_factor x "
            "head_dim = 2)"
        )


def _context(entry: Entry, scaling: RopeScaling | None, positions: int) -> int:
    if scaling is None:
        return positions
    if scaling.kind == "longrope":
        # Past the trained context every cached key would have to be rotated again with the long factors.
        return min(positions, scaling.original_positions)
    if entry.nested or scaling.kind == "llama3":
        return positions
    context = scaling.original_positions * scaling.factor
    if context > MAX_TOKENS:
        raise CheckpointError(
            f"config.json: {entry.name}.factor={scaling.factor:g} makes a context of {context:.3g} tokens; the "
            f"most is {MAX_TOKENS:,}"
        )
    return max(1, int(context)) if scaling.kind != "yarn" else max(positions, int(context))
