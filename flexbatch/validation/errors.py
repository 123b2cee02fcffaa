"""The one error of everything that is read from a model folder."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model folder is missing, incomplete, damaged or of an unknown kind. The message names the file, the tensor,
    what was wanted and what was found."""


class ConfigurationError(ValueError):
    """The user's settings are wrong: exit code 2."""


class DoesNotFitError(RuntimeError):
    """The plan needs more memory than the budgets give: exit code 4. The message holds a table of what needs how
    much."""


class EngineBusyError(RuntimeError):
    """An LLM was called while it was running something that cannot be joined or waited for."""


class EngineClosedError(RuntimeError):
    """An LLM was used after it was closed."""
