"""Sampling settings that lie beside a model: generation_config.json, read as `generate` of transformers reads it, for
users who give none of their own.

Tokens do not depend on keys that are not named here, such as those of caches, of transformers' own speculation and of
what it returns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flexbatch.config import EngineConfig
from flexbatch.models.resolve import resolve
from flexbatch.request import SamplingParams
from flexbatch.validation.checks import short
from flexbatch.validation.errors import CheckpointError, ConfigurationError, reason
from flexbatch.validation.sampling_fields import TRANSFORMERS_NAMES

FILE = "generation_config.json"
FIELDS = {
    **TRANSFORMERS_NAMES,
    **{
        name: name
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "no_repeat_ngram_size",
            "min_length",
            "bad_words_ids",
        )
    },
    **{
        name: name
        for name in (
            "suppress_tokens",
            "begin_suppress_tokens",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "sequence_bias",
        )
    },
}
"""Key of the file -> field of SamplingParams."""
DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""Fields without effect on greedy tokens."""
NOTHING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0,), "constraints": (), "force_words_ids": (),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,), "exponential_decay_length_penalty": (),
    "token_healing": (False,),
    "dola_layers": (), "watermarking_config": (), "penalty_alpha": (0,), "top_h": (1,), "typical_p": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,),
}  # fmt: skip
"""Keys that change tokens in a way that the engine does not have -> values with which they do not."""
GREEDY_ONLY = ("penalty_alpha",)
SAMPLED_ONLY = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class GenerationDefaults:
    """What the file says. ``source`` names it in errors; ``settings`` are its keys of `FIELDS`, and ``do_sample``, as
    far as they say something;
    ``unavailable`` its keys of `NOTHING` that ask for what the engine does not have."""

    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    unavailable: Mapping[str, Any] = field(default_factory=dict)

    def params(
        self,
        given: Mapping[str, Any] | None = None,
        *,
        sample: bool = False,
        max_tokens: int | None = SamplingParams.max_tokens,
    ) -> SamplingParams:
        """The user's settings, by the names of SamplingParams, and where they say nothing the file's.

        ``max_tokens`` and ``sample`` hold where both are silent: ``sample`` draws with temperature 1, else the
        likeliest tokens are taken. The file asks to
        draw by ``do_sample``, and by a temperature where it leaves that out. Raises ConfigurationError for what is
        wrong in either or unavailable.
        """
        given = dict(given or {})
        values = {FIELDS[key]: value for key, value in self.settings.items() if key in FIELDS}
        if "min_tokens" in values or "min_tokens" in given:
            values.pop("min_length", None)
        drawn = self.settings.get("do_sample", "temperature" in values or sample)
        values["temperature"] = values.get("temperature", 1.0) if drawn else 0.0
        values = {"max_tokens": max_tokens, **values}
        user = SamplingParams(
            **{**given, "max_tokens": given.get("max_tokens", SamplingParams.max_tokens), "min_tokens": 0}
        )  # their own errors first
        self._refuse(greedy=given.get("temperature", values["temperature"]) == 0)
        try:
            own = SamplingParams(**{**values, "min_tokens": 0})
            least = SamplingParams(min_tokens=values.get("min_tokens", 0), max_tokens=2**31 - 1).min_tokens
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.source}: {_by_key(str(error))}") from None
        chosen = {
            name: getattr(user if name in given else own, name)
            for name in (entry.name for entry in fields(SamplingParams))
        }
        # EOS stays barred to the end of a shorter answer, as in transformers; of a user, that is a mistake.
        limit = chosen["max_tokens"]
        least = least if limit is None else min(least, limit)
        return SamplingParams(**{**chosen, "min_tokens": given.get("min_tokens", least)})

    def _refuse(self, greedy: bool) -> None:
        """Raises ConfigurationError that names the keys that cannot be followed."""
        idle = SAMPLED_ONLY if greedy else GREEDY_ONLY
        asked = [f"{key}={short(value)}" for key, value in self.unavailable.items() if key not in idle]
        if asked:
            raise ConfigurationError(
                f"{self.source} asks for {', '.join(asked)}, which is not available here. "
                "Give SamplingParams of your own, or set generation_config to none (--generation-config none), "
                "to go on without what the file says"
            )

    def left_out(self, params: SamplingParams) -> list[str]:
        """The settings of the file that SamplingParams leave at their defaults and so do not apply, as
        ``key=value``."""
        if params.max_tokens == 0:
            return []
        idle = (*DRAWING, *SAMPLED_ONLY) if params.greedy else GREEDY_ONLY
        if self.settings.get("do_sample") is False:
            idle = (*idle, *DRAWING)
        out = []
        for key, value in self.settings.items():
            name = FIELDS.get(key, "")
            if name and key not in idle and getattr(params, name) == DEFAULTS[name] != _kept(name, value):
                out.append(f"{key}={short(value)}")
        return out + [f"{key}={short(value)}" for key, value in self.unavailable.items() if key not in idle]


DEFAULTS = {entry.name: getattr(SamplingParams(), entry.name) for entry in fields(SamplingParams)}


def _by_key(message: str) -> str:
    """An error about a field of SamplingParams as one about the key of the file that it comes from."""
    keys = {name: key for key, name in FIELDS.items()}
    return re.sub(r"^sampling parameter (\w+)=", lambda match: f"{keys.get(match[1], match[1])}=", message)


def _kept(name: str, value: Any) -> Any:
    """A value as SamplingParams keep it, or as it is where they refuse it."""
    try:
        return getattr(SamplingParams(**{"max_tokens": 2**31 - 1, name: value}), name)
    except ConfigurationError:
        return value


def generation_of(config: EngineConfig, folder: Path | None = None) -> GenerationDefaults:
    """Returns the defaults of the configured model, unless the user wants none of them; random weights have none.
    ``folder``: the model's, where it is open already. Raises CheckpointError."""
    if config.dummy_weights or config.generation_config == "none":
        return GenerationDefaults()
    return read_generation(folder or resolve(config.model))


def read_generation(folder: Path | str) -> GenerationDefaults:
    """What the folder's generation_config.json says; nothing where there is none. Raises CheckpointError for a file
    that is no JSON object."""
    path = Path(folder) / FILE
    if not path.is_file():
        return GenerationDefaults()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, wanted an object")
    content = {key: value for key, value in content.items() if value is not None}
    settings = {key: value for key, value in content.items() if key in FIELDS or key == "do_sample"}
    if not isinstance(settings.get("do_sample", False), bool):
        raise ConfigurationError(f"{path}: do_sample={short(settings['do_sample'])} must be true or false")
    unavailable = {key: value for key, value in content.items() if key in NOTHING and value not in NOTHING[key]}
    return GenerationDefaults(str(path), settings, unavailable)
