"""Tests for HELM's environment (apps/helm_env.sh); in the project's own they are skipped. test_helm.py runs them
there."""

from __future__ import annotations

import pytest

collect_ignore_glob: list[str] = []
try:
    import helm  # noqa: F401
except ModuleNotFoundError:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A fresh folder for HELM's output, caches and configuration."""
    return tmp_path_factory.mktemp("helm")
