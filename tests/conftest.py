"""What holds for all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_profiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test measures the machine it runs on, nor reads what its user's cache folder holds."""
    monkeypatch.setattr("flexbatch.policy.profile.cached", refuse_to_measure)


def refuse_to_measure(*arguments: object) -> None:
    raise AssertionError("a test would measure this machine: give it --hardware cpu")
