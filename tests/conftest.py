"""What holds for all tests."""

from __future__ import annotations

import pytest

from flexbatch.policy.rates import load_hardware


@pytest.fixture(autouse=True)
def no_profiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine of a test measures the machine it runs on, nor reads what its user's cache folder holds."""
    monkeypatch.setattr("flexbatch.machines.this_machine", lambda *arguments, **options: load_hardware("cpu"))
