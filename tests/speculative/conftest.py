"""Target and draft pairs for end-to-end tests: the engine's tiny random models."""

from tests.engine.conftest import reference

__all__ = ["reference"]
