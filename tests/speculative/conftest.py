"""Target and draft pairs for end-to-end tests: the engine's tiny random models."""

from __future__ import annotations

import pytest

from tests.tiny_models import make_model


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A draft of another shape with other weights: it agrees with the target about as often as chance does."""
    folder = tmp_path_factory.mktemp("other")
    make_model("llama-single", folder, seed=9)
    return folder
