"""Wrong types of the engine's settings: refused by the name of the setting, whatever is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from flexbatch.config import EngineConfig
from flexbatch.validation.errors import ConfigurationError

VALUES = [
    *(None, True, False, 0, 1, -1, 1.5, float("nan"), float("inf"), 10**30, "x", "", "16", b"x", object()),
    *([], [1], ["x"], [None], [[1]], {}, {"a": 1}, {1}, (1, 2), range(10**9), 1j),
]
FIELDS = [field.name for field in dataclasses.fields(EngineConfig)]
KINDS = {"str": str, "int": int, "bool": bool, "float": float, "tuple": tuple, "None": type(None)}


@pytest.mark.parametrize("field", dataclasses.fields(EngineConfig), ids=FIELDS)
def test_a_setting_has_its_type_or_is_refused_by_its_name(field):
    kinds = tuple(KINDS[part.split("[")[0].strip()] for part in str(field.type).split("|"))
    for value in VALUES:
        try:
            kept = getattr(EngineConfig(**{field.name: value}), field.name)
        except ConfigurationError as error:
            assert field.name in str(error) or "size in bytes" in str(error), (value, error)
            assert len(str(error)) < 400
            continue
        assert isinstance(kept, kinds), (value, kept)
        assert bool in kinds or not isinstance(kept, bool), (value, kept)
        assert kept == kept, (value, kept)


@pytest.mark.parametrize(
    ("setting", "value", "kept"),
    [
        ("draft", "demo-draft", ("demo-draft",)),
        ("draft", ["ngram", Path("folder")], ("ngram", "folder")),
        ("draft", Path("folder"), ("folder",)),
        ("model", Path("folder"), "folder"),
        ("offload_dir", Path("folder"), "folder"),
        ("hardware", Path("machine.json"), "machine.json"),
        ("device", torch.device("cuda:1"), "cuda:1"),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("gpu_batch_size", np.int64(3), 3),
        ("percent", np.array([100, 0, 100, 0, 100, 0]), (100, 0, 100, 0, 100, 0)),
        ("allow_bits", 8, (8,)),
        ("cpu_memory", 2**30, 2**30),
        ("overlap", np.bool_(False), False),
    ],
)
def test_what_means_a_setting_is_kept_as_one(setting, value, kept):
    found = getattr(EngineConfig(**{setting: value}), setting)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("gpu_batch_size", "8", "setting gpu_batch_size='8' must be a whole number"),
        ("gpu_memory", 1.5, "setting gpu_memory=1.5 must be a whole number of bytes, or text such as 16GiB"),
        ("draft", {"demo-draft": 1}, "setting draft={'demo-draft': 1} must be a folder, a Hub id"),
        ("draft", ["ngram", 5], r"setting draft=\('ngram', 5\) \(element 1 is 5\) must be a folder"),
        ("overlap", "no", "setting overlap='no' must be True or False"),
        ("percent", [0, float("nan"), 0, 0, 0, 0], r"percent=\(0, nan.* \(element 1 is nan\) must be finite"),
    ],
)
def test_the_message_says_what_is_wanted(setting, value, message):
    with pytest.raises(ConfigurationError, match=message):
        EngineConfig(**{setting: value})
