"""What a job's answers depend on: a resumed job whose model or settings changed is another job."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from flexbatch.apps.batch import model_identity
from flexbatch.config import EngineConfig
from flexbatch.validation.errors import ConfigurationError
from tests.tiny_models import make_model


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    make_model("llama", tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "draft")
    return EngineConfig(model=str(tmp_path / "model"), offload_dir=str(tmp_path / "offload"), device="cpu")


READ = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja")


@pytest.mark.parametrize("name", READ)
def test_every_file_of_the_model_counts(name: str, config: EngineConfig) -> None:
    before = model_identity(config)
    assert model_identity(config) == before
    path = Path(config.model) / name
    path.write_bytes(path.read_bytes() + b"\n" if path.is_file() else b"{}\n")
    after = model_identity(config)
    assert after["files"].pop(name) != before["files"].pop(name, None) and after == before


CHANGES: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bfloat16"},
    "allow_bits": {"allow_bits": (16, 8)},
    "draft_sampling": {"draft_sampling": "without-replacement"},
    "tree": {"tree": "chain:2"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_change_tokens_count(name: str, config: EngineConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, draft=(str(tmp_path / "draft"),), draft_sampling="independent", tree="chain:3")
    assert model_identity(dataclasses.replace(config, **CHANGES[name])) != model_identity(config)


def test_a_dtype_counts_as_it_works_out(config: EngineConfig) -> None:
    """On a CPU the default is float32, on a GPU another: what was begun on one does not go on with the other."""
    assert model_identity(dataclasses.replace(config, dtype="float32")) == model_identity(config)
    assert model_identity(config)["dtype"] == "float32"
    allowed = [model_identity(dataclasses.replace(config, allow_bits=bits)) for bits in ((8, 16), (16, 8))]
    assert allowed[0] == allowed[1] != model_identity(config)


def test_a_draft_counts_where_it_changes_tokens(config: EngineConfig, tmp_path: Path) -> None:
    """With its own noise it decides which tokens come of a distribution, with the target's about the speed alone."""
    draft = str(tmp_path / "draft")
    assert model_identity(dataclasses.replace(config, draft=(draft, "ngram"), tree="chain:3")) == model_identity(config)
    sampled = dataclasses.replace(config, draft=(draft,), draft_sampling="independent")
    before = model_identity(sampled)
    make_model("llama", tmp_path / "draft", seed=1)
    assert model_identity(sampled) != before


def test_random_weights_count_by_shape_and_seed(config: EngineConfig) -> None:
    random = dataclasses.replace(config, model="opt-125m", dummy_weights=True)
    assert model_identity(random) != model_identity(dataclasses.replace(random, seed=1))
    with pytest.raises(ConfigurationError, match="no public shape"):
        model_identity(dataclasses.replace(random, model="opt-126m"))
