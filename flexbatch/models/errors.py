"""The one error of everything that is read from a model folder."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model folder is missing, incomplete, damaged or of an unknown kind. The message names the file, the tensor, what was wanted and what was found."""
