"""What every command shares: flags derived from settings, where settings come from, logging and exit codes. Imports
no torch."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from flexbatch.cli.help import JOB, CommandParser
from flexbatch.config import EngineConfig
from flexbatch.text.files import read_text
from flexbatch.validation.checks import closest
from flexbatch.validation.errors import ConfigurationError, reason

ENVIRONMENT_PREFIX = "FLEXBATCH_"
ALMOST = 0.82
"""Likeness from which a variable is a misspelled one: settings of two commands are less alike."""
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

logger = logging.getLogger("flexbatch")


def parse_bool(text: str) -> bool:
    """true/false, yes/no, on/off, 1/0. Raises ValueError."""
    if text.lower() not in BOOLEANS:
        raise ValueError(f"{text!r} is not true or false")
    return BOOLEANS[text.lower()]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass, as a flag, an environment variable and a YAML key."""

    name: str
    default: Any
    kind: type
    """int, float, str or bool: the type of the value, or of each element."""
    many: bool
    metadata: Mapping[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    def parse(self, text: str) -> Any:
        """The value of one word. Raises ValueError."""
        return parse_bool(text) if self.kind is bool else self.kind(text)

    def from_text(self, text: str, source: str) -> Any:
        """The value of an environment variable; several elements stand apart by spaces or commas. Raises
        ConfigurationError that names `source`."""
        try:
            value = (
                tuple(self.parse(word) for word in text.replace(",", " ").split()) if self.many else self.parse(text)
            )
        except ValueError as error:
            raise ConfigurationError(f"{source}={text!r}: {self.wanted}") from error
        return self._checked(value, source)

    def from_yaml(self, value: Any, source: str) -> Any:
        """The value of a YAML key. Raises ConfigurationError that names `source`."""
        if value is None:
            return self.default
        if isinstance(value, str):
            return self.from_text(value, source)
        values = tuple(value) if self.many and isinstance(value, list) else (value,)
        if self.kind is not str and any(isinstance(element, bool) != (self.kind is bool) for element in values):
            raise ConfigurationError(f"{source}={value!r}: {self.wanted}")
        if not all(isinstance(element, (bool, int, float, str)) for element in values) or (
            self.kind is int and any(element != int(element) for element in values)
        ):
            raise ConfigurationError(f"{source}={value!r}: {self.wanted}")
        converted = tuple(self.kind(element) for element in values)
        return self._checked(converted if self.many else converted[0], source)

    def _checked(self, value: Any, source: str) -> Any:
        choices = self.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigurationError(f"{source}={value!r}: choose from {', '.join(map(str, choices))}")
        return value

    @property
    def wanted(self) -> str:
        noun = {int: "whole number", float: "number", bool: "true or false", str: "text"}[self.kind]
        return f"needs {noun}{'s' if self.many and self.kind is not bool else ''}"


def settings_of(config_class: type) -> list[Setting]:
    """The fields of a settings dataclass. Types understood: bool, int, float, str, tuples of one of them, each
    optional."""
    hints = typing.get_type_hints(config_class)
    return [_setting(field, hints[field.name]) for field in dataclasses.fields(config_class)]


def _setting(field: dataclasses.Field, hint: Any) -> Setting:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    options = tuple(option for option in options if option is not type(None))
    many = typing.get_origin(options[0]) is tuple
    kind = str if str in options else typing.get_args(options[0])[0] if many else options[0]
    if kind not in (bool, int, float, str):
        raise TypeError(f"field {field.name} has type {hint}: no flag can be made of it")
    return Setting(field.name, field.default, kind, many, field.metadata)


def add_arguments(
    parser: argparse.ArgumentParser, config_class: type, title: str, only: Sequence[str] | None = None
) -> None:
    """A flag for every field, or for those in ``only``, in the group that shows it (`help.GROUPS`), else in ``title``.
    What is not on the command line is absent from the namespace, so that lower sources can speak."""
    own = None if isinstance(parser, CommandParser) else parser.add_argument_group(title)
    for setting in settings_of(config_class):
        if only is not None and setting.name not in only:
            continue
        group: Any = parser.group_of(setting.name, title) if isinstance(parser, CommandParser) else own
        extra = {key: value for key, value in setting.metadata.items() if key not in ("help", "aliases")}
        names = (setting.flag, *setting.metadata.get("aliases", ()))
        text = setting.metadata.get("help", "").replace("%", "%%")
        if setting.default not in (None, (), False) and "default:" not in text:
            text += f" (default: {str(setting.default).lower() if setting.kind is bool else setting.default})"
        common = {"dest": setting.name, "default": argparse.SUPPRESS, "help": text}
        if setting.kind is bool and setting.default is False:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **common, **extra)
        elif setting.kind is bool:
            group.add_argument(
                *names, nargs="?", const=True, type=_argument(setting), metavar="true|false", **common, **extra
            )
        else:
            group.add_argument(*names, type=_argument(setting), **common, **{"metavar": _metavar(setting), **extra})


def _metavar(setting: Setting) -> Any:
    if "choices" in setting.metadata:
        return "{" + ",".join(map(str, setting.metadata["choices"])) + "}"
    return {int: "N", float: "X", str: setting.name.split("_")[-1].upper()}[setting.kind]


def _argument(setting: Setting) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return setting.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {setting.wanted}") from error

    return convert


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of EngineConfig, and --config."""
    group = parser.group_of("config", JOB) if isinstance(parser, CommandParser) else parser
    group.add_argument(
        "--config", metavar="FILE", help="YAML file of settings: any flag by its name, e.g. gpu_batch_size: 32"
    )
    add_arguments(parser, EngineConfig, "engine")


def read_settings(
    classes: Sequence[type], args: argparse.Namespace, environ: Mapping[str, str], config_file: str | None
) -> list[Any]:
    """One instance of each settings dataclass: command line, then FLEXBATCH_* variables, then the YAML file, then
    defaults.

    Raises ConfigurationError that names the flag, variable, or file and key.
    """
    known = {setting.name: setting for config_class in classes for setting in settings_of(config_class)}
    values: dict[str, Any] = {}
    for key, value in _read_yaml(config_file).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigurationError(f"{config_file}: unknown setting {key!r}{closest(name, known)}")
        values[name] = known[name].from_yaml(value, f"{config_file}: {key}")
    refuse_misspelled(environ, {setting.variable for setting in known.values()})
    for setting in known.values():
        if setting.variable in environ:
            values[setting.name] = setting.from_text(environ[setting.variable], setting.variable)
        if hasattr(args, setting.name):
            value = getattr(args, setting.name)
            values[setting.name] = tuple(value) if setting.many and value is not None else value
    return [
        config_class(
            **{
                name: values[name]
                for name in (field.name for field in dataclasses.fields(config_class))
                if name in values
            }
        )
        for config_class in classes
    ]


def refuse_misspelled(environ: Mapping[str, str], known: Collection[str]) -> None:
    """Raises ConfigurationError for a FLEXBATCH_* variable that is almost one of the command's. Others may be another
    command's, or another program's."""
    for name in environ:
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            alike = {variable.removeprefix(ENVIRONMENT_PREFIX): variable for variable in known}
            matches = difflib.get_close_matches(name.removeprefix(ENVIRONMENT_PREFIX).upper(), alike, 1, ALMOST)
            if matches:
                raise ConfigurationError(f"unknown variable {name}; did you mean {alike[matches[0]]}?")


def engine_config(
    args: argparse.Namespace, environ: Mapping[str, str] = os.environ, config_file: str | None = None
) -> EngineConfig:
    """EngineConfig from all sources; see `read_settings`. `config_file` defaults to --config."""
    (config,) = read_settings([EngineConfig], args, environ, config_file or getattr(args, "config", None))
    return config


def refuse_measurements(config: EngineConfig) -> None:
    """For commands whose text counts, and which take prompts as they come. Raises ConfigurationError for settings
    that only measure an engine."""
    remedy = "measure with flexbatch run"
    if config.simulate_acceptance is not None:
        raise ConfigurationError(
            f"--simulate-acceptance {config.simulate_acceptance:g} makes text that means nothing: leave it out "
            f"here, or {remedy}"
        )
    if config.compare_plain:
        raise ConfigurationError(
            f"--compare-plain runs a whole job twice, and here prompts come one by one: leave it out here, or {remedy}"
        )
    if config.dummy_weights:
        raise ConfigurationError(
            f"--dummy-weights has no tokenizer, so that prompts of text cannot be read: leave it out here, or {remedy}"
        )


def _read_yaml(config_file: str | None) -> dict[Any, Any]:
    if config_file is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(read_text(config_file))
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{config_file}: cannot be read as YAML: {reason(error)}") from error
    if not isinstance(content, dict | None):
        raise ConfigurationError(
            f"{config_file}: needs a mapping of settings, e.g. gpu_batch_size: 32; it holds a {type(content).__name__}"
        )
    return content or {}
