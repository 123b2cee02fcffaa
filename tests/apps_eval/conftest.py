from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from oracle import make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A Llama with 256 positions, without BOS and without a chat template."""
    return make_model(tmp_path_factory.mktemp("tiny") / "llama", positions=256)


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory) -> Path:
    """A Llama whose tokenizer prepends BOS and has a chat template."""
    return make_model(tmp_path_factory.mktemp("tiny") / "chat", seed=1, bos=True, chat=True)
