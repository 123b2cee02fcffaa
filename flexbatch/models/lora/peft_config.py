"""adapter_config.json of PEFT: what of it decides the arithmetic, and what is refused because it would change it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexbatch.models.lora.request import CONFIG_FILE
from flexbatch.models.source import read_json
from flexbatch.validation.checks import short
from flexbatch.validation.errors import CheckpointError

USED = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
    }
)
HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "parent_library",
        "revision",
        "inference_mode",
        "peft_version",
        "lora_dropout",
        "fan_in_fan_out",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
    }
)
"""Keys that say how an adapter was trained, or where it is from: they change nothing of what it computes."""
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the model's own weights as they are."""
MERGE = "merge it into the model with merge_and_unload of PEFT"
REFUSED = {
    "use_dora": "DoRA scales every column of the sum of weights and update",
    "use_qalora": "QA-LoRA pools the inputs of the update",
    "alora_invocation_tokens": "activated LoRA begins in the middle of a prompt",
    "target_parameters": "parameters of experts were trained, not linear modules",
    "layer_replication": "layers of the model are repeated",
    "lora_bias": "the second factors have biases",
}


@dataclass(frozen=True)
class PeftConfig:
    """What of adapter_config.json the arithmetic depends on."""

    file: Path
    rank: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    """Ends of the names of modules that were trained whole."""
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Single tokens that were trained, by the end of the module's name; without a name those of the embedding."""
    ties: bool = False
    """Whether an embedding that is the head as well was trained as both."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Ends of the names of all modules with rows of their own."""
        return (*self.modules_to_save, *self.tokens)

    def saves(self, module: str) -> bool:
        return any(module.endswith(name) for name in self.modules_to_save)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        return next((tokens for name, tokens in self.tokens.items() if module.endswith(name)), ())

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_key_of(module, self.rank_pattern), self.rank)

    def scale_of(self, module: str) -> float:
        """What the update of a module is multiplied by."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_key_of(module, self.alpha_pattern), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def targets(self, module: str, linear: bool) -> bool:
        """Whether a module of the model was trained. linear: it is what "all-linear" means, any but the head."""
        if self.exclude_modules and _named(module, self.exclude_modules):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return linear
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        return _named(module, self.target_modules) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){each}\.(\d+)\." for each in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for each in patterns if (match := re.match(each, module))), None)
        return found is not None and int(found[1]) in self.layers


def _named(module: str, names: str | tuple[str, ...]) -> bool:
    """Whether a list of names, or a regular expression, means a module, as PEFT reads them."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _key_of(module: str, patterns: Mapping[str, Any]) -> str:
    """The first key of a pattern that means a module, as PEFT reads them."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def read_peft_config(folder: Path) -> PeftConfig:
    """Raises CheckpointError that names the file and the key for what is wrong or not supported."""
    file = folder / CONFIG_FILE
    if not folder.is_dir():
        raise CheckpointError(f"adapter folder {folder} does not exist")
    config = read_json(file)
    try:
        _check_supported(config)
        ranks, alphas = _patterns(config, "rank_pattern"), _patterns(config, "alpha_pattern")
        return PeftConfig(
            file=file,
            rank=_whole(config, "r", 8),
            alpha=_number(config, "lora_alpha", 8),
            rank_stabilized=bool(config.get("use_rslora")),
            rank_pattern={key: _whole(ranks, key) for key in ranks},
            alpha_pattern={key: _number(alphas, key) for key in alphas},
            target_modules=_names(config, "target_modules"),
            exclude_modules=_names(config, "exclude_modules"),
            layers=_layers(config.get("layers_to_transform")),
            layers_pattern=_list(_names(config, "layers_pattern")),
            modules_to_save=_list(_names(config, "modules_to_save")),
            tokens=_tokens(config.get("trainable_token_indices")),
            ties=bool(config.get("ensure_weight_tying")),
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _check_supported(config: Mapping[str, Any]) -> None:
    """Raises ValueError."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type {kind!r} is not supported; supported: LORA")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"task_type {task!r} is not supported: the adapter is for another kind of model than CAUSAL_LM"
        )
    if config.get("bias") not in (None, "none"):
        raise ValueError(f"bias={config['bias']!r}: biases of the model were trained, too; {MERGE}")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} changes the weights of the model that the adapter is added to; save it with "
            f"path_initial_model_for_weight_conversion of PEFT, or {MERGE}"
        )
    for key, value in config.items():
        if value in (None, False, 0) or value in ([], {}, ""):
            continue
        if key in REFUSED:
            raise ValueError(f"{key}={short(value)} is not supported: {REFUSED[key]}; {MERGE}")
        if key not in USED and key not in HARMLESS:
            raise ValueError(f"{key}={short(value)} is not known, and may change what the adapter computes; {MERGE}")


def _whole(config: Mapping[str, Any], key: str, default: int = 0) -> int:
    value = config.get(key, default)
    if type(value) is not int or not 0 < value < 2**16:
        raise ValueError(f"{key}={short(value)} must be a whole number, the rank of the update")
    return value


def _number(config: Mapping[str, Any], key: str, default: float = 0.0) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key}={short(value)} must be a number")
    return float(value)


def _patterns(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}={short(value)} must map names of modules to numbers")
    for name in value:
        _compiled(key, name)
    return value


def _compiled(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from None


def _names(config: Mapping[str, Any], key: str) -> str | tuple[str, ...]:
    value = config.get(key)
    if isinstance(value, str) and value:
        _compiled(key, value)
        return value
    if value is None or value == "":
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key}={short(value)} must be a list of names of modules, or a regular expression")
    return tuple(value)


def _list(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _tokens(value: Any) -> Mapping[str, tuple[int, ...]]:
    named = value if isinstance(value, dict) else {"": value} if value else {}
    for tokens in named.values():
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError(f"trainable_token_indices={short(value)} must be a list of tokens, or one for each module")
    return {name: tuple(tokens) for name, tokens in named.items() if tokens}


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise ValueError(f"layers_to_transform={short(value)} must be numbers of layers")
    return tuple(layers)
