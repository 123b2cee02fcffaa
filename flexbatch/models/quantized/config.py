"""The ``quantization_config`` of a config.json: which module is stored by which scheme."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flexbatch.models.config_types import FLAG, MAX_INNER, NAMES, OBJECT, TEXT, Rule, check_keys, shown
from flexbatch.models.quantized import compressed
from flexbatch.models.quantized.blocks4 import Blocks4
from flexbatch.models.quantized.grids import ROW, TENSOR, Floats, Grid, Integers
from flexbatch.models.quantized.modules import left_alone, matches, targeted
from flexbatch.models.quantized.mxfp4 import BlockFloats
from flexbatch.models.quantized.scheme import Scheme
from flexbatch.models.quantized.words import AWQ, GPTQ, AWQByInputs
from flexbatch.validation.errors import CheckpointError

SKIP_LISTS = ("modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules")
"""What methods but compressed-tensors call the list of modules that they left alone."""
UNUSED = (
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
    *("activation_scale", "k_scale", "v_scale", "q_scale", "prob_output_scale"),
)
"""Scales of activations and of the cache, which are computed and stored as the settings say."""

SUFFIXES = (*Blocks4.suffixes, *GPTQ.suffixes, *Floats.suffixes, *BlockFloats.suffixes)
"""What may follow the name of a module whose matrix is in codes, of any method."""


@dataclass(frozen=True)
class Override:
    """A regular expression for names of modules, and how GPTQModel stored these; None: not at all."""

    pattern: str
    scheme: Scheme | None


@dataclass(frozen=True)
class Quantization:
    """schemes: by the targets of compressed-tensors; any other method has one, for everything. skipped: modules that
    were left alone. notes: what is done otherwise than its own runtime does, for the log."""

    method: str
    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    skipped: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    notes: tuple[str, ...] = ()
    skip_key: str = field(default="ignore", kw_only=True)

    def __str__(self) -> str:
        kinds = dict.fromkeys(str(scheme) for _, scheme in self.schemes)
        return ", ".join(kinds) or f"{self.method}, nothing of it in codes"

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """What may follow a module's name beside ``weight``, the longest first."""
        others = (override.scheme for override in self.overrides if override.scheme is not None)
        found = {suffix for scheme in (*(each for _, each in self.schemes), *others) for suffix in scheme.suffixes}
        return tuple(sorted(found, key=lambda suffix: (-len(suffix), suffix)))

    @property
    def patterns(self) -> list[tuple[str, str]]:
        """Every regular expression, with its key."""
        found = [(override.pattern, "dynamic") for override in self.overrides]
        if self.method != compressed.METHOD:
            return found + [(entry, self.skip_key) for entry in self.skipped]
        targets = [(target, "config_groups") for targets, _ in self.schemes for target in targets]
        named = [*targets, *((entry, self.skip_key) for entry in self.skipped)]
        return [(entry.removeprefix("re:"), key) for entry, key in named if entry.startswith("re:")]

    def is_skipped(self, names: Collection[str], kind: str) -> bool:
        """Whether the module of these names was left alone."""
        if self.method == compressed.METHOD:
            return any(targeted(entry, names, kind, self.skip_key) for entry in self.skipped)
        return left_alone(self.skipped, names, self.skip_key)

    def scheme_of(self, names: Collection[str], kind: str) -> Scheme | None:
        """How a module is stored where it is in codes; None: it was left alone. names: its own, with the prefixes that
        it may have. kind: its class in torch. Raises CheckpointError for an entry that is no regular expression."""
        if self.is_skipped(names, kind):
            return None
        for override in self.overrides:
            if any(matches(override.pattern, name, "dynamic") for name in names):
                return override.scheme
        best, found = 0, None
        for targets, scheme in self.schemes:
            fit = max((targeted(target, names, kind, "config_groups") for target in targets), default=1)
            if fit > best:
                best, found = fit, scheme
        return found


Keys = Mapping[str, Any]
LAYOUT_KEYS = ("checkpoint_format", "format", "version")
PACKED: dict[str, Rule] = {
    "quant_method": TEXT,
    **dict.fromkeys(LAYOUT_KEYS, TEXT),
    "pack_dtype": TEXT,
    **dict.fromkeys(("is_marlin_format", "sym", "desc_act", "static_groups"), FLAG),
    "dynamic": OBJECT,
    **dict.fromkeys(SKIP_LISTS, NAMES),
}


def read_quantization(config: Keys) -> Quantization | None:
    """None without one. Raises CheckpointError that names the key for what is not supported."""
    check_keys(config, {"quantization_config": OBJECT, "compression_config": OBJECT})
    values = config.get("quantization_config") or config.get("compression_config")
    if not values:
        return None
    check_keys(values, {"quant_method": TEXT}, "quantization_config.")
    method = str(values.get("quant_method")).lower()
    if method not in METHODS:
        raise CheckpointError(
            f"config.json: quantization_config.quant_method {values.get('quant_method')!r:.80} is not supported; "
            f"supported: {', '.join(METHODS)}. Take the model before it was quantized, with --weight-bits 4 or 8, or a "
            "GGUF file of it"
        )
    found = METHODS[method](method, values)
    for pattern, key in found.patterns:
        matches(pattern, "", key)
    return found


def skipped_of(values: Keys) -> dict[str, Any]:
    check_keys(values, dict.fromkeys(SKIP_LISTS, NAMES), "quantization_config.")
    names = [name for key in SKIP_LISTS for name in values.get(key) or ()]
    key = next((key for key in SKIP_LISTS if values.get(key)), SKIP_LISTS[0])
    return {"skipped": tuple(names), "skip_key": key}


def _bits(values: Keys, method: str, known: tuple[int, ...]) -> int:
    bits = _agreed(values, ("bits", "w_bit"), None)
    if type(bits) is not int or bits not in known:
        raise CheckpointError(
            f"config.json: quantization_config with quant_method {method!r} and {shown(bits)} bits is not supported; "
            f"supported: {', '.join(map(str, known))} bits"
        )
    return bits


def _group(values: Keys) -> int:
    group = _agreed(values, ("group_size", "q_group_size"), 128)
    if type(group) is not int or not (group == -1 or 1 <= group <= MAX_INNER):
        raise CheckpointError(
            f"config.json: quantization_config.group_size={shown(group)} must be a number of inputs, or -1 for "
            "whole rows"
        )
    return max(group, 0)


def _layout(values: Keys, method: str, known: Collection[str]) -> str:
    check_keys(values, PACKED, "quantization_config.")
    layout: str = "marlin" if values.get("is_marlin_format") else _agreed(values, LAYOUT_KEYS, next(iter(known)))
    if layout not in known:
        raise CheckpointError(
            f"config.json: quantization_config with {method} layout {layout!r} is not supported; supported: "
            f"{' and '.join(known)}"
        )
    words = values.get("pack_dtype") or "int32"
    if words.lower().removeprefix("torch.") != "int32":
        raise CheckpointError(
            f"config.json: quantization_config.pack_dtype={words!r} is not supported; supported: int32"
        )
    return layout


def _agreed(values: Keys, names: tuple[str, ...], default: Any) -> Any:
    """The value that one or several spellings of a key give, in small letters. Raises CheckpointError where they
    contradict each other."""
    found = {name: values[name] for name in names if values.get(name) is not None}
    lowered = {name: value.lower() if isinstance(value, str) else value for name, value in found.items()}
    if not lowered:
        return default
    first = next(iter(lowered.values()))
    if any(value != first for value in lowered.values()):
        raise CheckpointError(
            "config.json: quantization_config says "
            f"{' and '.join(f'{name}={value!r}' for name, value in found.items())}; these contradict"
        )
    return first


def _awq(method: str, values: Keys) -> Quantization:
    layout = _layout(values, method, ("gemm", "gemv"))
    kind = AWQ if layout == "gemm" else AWQByInputs
    return Quantization(method, (((), kind(_bits(values, method, (4,)), _group(values))),), **skipped_of(values))


def _gptq(method: str, values: Keys) -> Quantization:
    def scheme(settings: Keys) -> GPTQ:
        offset = {"gptq": 1, "gptq_v2": 0}[_layout(settings, method, ("gptq", "gptq_v2"))]
        bits = _bits(settings, method, (4, 8, 3, 2))
        group = _group(settings)
        reorders = bool(group and settings.get("desc_act") and not settings.get("static_groups"))
        return GPTQ(bits, group, offset, bool(settings.get("sym")), reorders)

    found, overrides = scheme(values), []
    for pattern, change in (values.get("dynamic") or {}).items():
        if not isinstance(change, dict | None):
            raise CheckpointError(f"config.json: quantization_config.dynamic: {pattern!r:.200} must be an object")
        same = {**values, "dynamic": None}
        own = None if pattern.startswith("-:") else scheme({**same, **(change or {})})
        overrides.append(Override(pattern.removeprefix("-:").removeprefix("+:"), own))
    return Quantization(method, (((), found),), overrides=tuple(overrides), **skipped_of(values))


def _fp8(method: str, values: Keys) -> Quantization:
    check_keys(values, {"fmt": TEXT, "scale_fmt": TEXT, "weight_block_size": compressed.BLOCK}, "quantization_config.")
    block = values.get("weight_block_size")
    grids = (Grid(*block),) if block else (TENSOR, ROW)
    scheme = Floats(grids, "", exponents=str(values.get("scale_fmt")).lower() == "ue8m0")
    return Quantization(method, (((), scheme),), **skipped_of(values), notes=(compressed.WIDE,))


def _bitsandbytes(method: str, values: Keys) -> Quantization:
    loads = {bits: values.get(f"load_in_{bits}bit", values.get(f"_load_in_{bits}bit")) for bits in (4, 8)}
    check_keys({"load_in_4bit": loads[4], "load_in_8bit": loads[8]}, {f"load_in_{bits}bit": FLAG for bits in (4, 8)})
    if bool(loads[4]) == bool(loads[8]):
        raise CheckpointError(
            "config.json: quantization_config of bitsandbytes says "
            f"{'both' if loads[4] else 'neither'} load_in_4bit {'and' if loads[4] else 'nor'} load_in_8bit; one of "
            "them is true"
        )
    scheme = Blocks4() if loads[4] else Integers((ROW,), "SCB", divisor=127.0)
    return Quantization(method, (((), scheme),), **skipped_of(values))


def _mxfp4(method: str, values: Keys) -> Quantization:
    return Quantization(method, (((), BlockFloats()),), **skipped_of(values))


def _compressed(method: str, values: Keys) -> Quantization:
    schemes, skipped, notes = compressed.read(values)
    return Quantization(method, schemes, skipped, notes=notes)


METHODS: dict[str, Callable[[str, Keys], Quantization]] = {
    "awq": _awq,
    "gptq": _gptq,
    compressed.METHOD: _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}
