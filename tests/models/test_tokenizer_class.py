"""The tokenizer of a folder is the one that AutoTokenizer opens by itself, whatever its two configurations say; and the
class of the model's configuration is left alone where nobody needs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from flexbatch.models.resolve import BUNDLED, DEMO, load_tokenizer

TYPES = ("llama", "gpt2", "qwen2", "opt", "mistral", "gemma", "phi3", "no such type", None, 3)
CLASSES = (
    "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "LlamaTokenizer", "GPT2TokenizerFast",
    "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizerFast", "NoSuchTokenizer", None, 5,
)  # fmt: skip
TEXT = "Hello, wörld!  Two spaces\n<|endoftext|> and 12345"


def folder_of(position: Path, model: Any, tokenizer: Any) -> Path:
    position.mkdir()
    shutil.copy(DEMO / "tokenizer.json", position)
    for name, values in (("config.json", model), ("tokenizer_config.json", tokenizer)):
        if values is not None:
            (position / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return position


def opened(load: Any) -> Any:
    """What a tokenizer is and does, or that there is none."""
    try:
        tokenizer = load()
    except Exception:  # CheckpointError, and of transformers any
        return "no tokenizer"
    try:
        encoded = tokenizer(TEXT).input_ids
    except Exception as error:  # of a class that wants tokens which the vocabulary lacks
        encoded = str(error)
    own = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "backend_tokenizer", None) is not None else None
    return type(tokenizer), encoded, tokenizer.special_tokens_map, tokenizer.model_max_length, own


def same(folder: Path) -> Any:
    by_itself = opened(lambda: AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    assert opened(lambda: load_tokenizer(folder)) == by_itself
    return by_itself


@pytest.mark.parametrize("kind", TYPES)
def test_the_tokenizer_is_that_of_transformers(kind, tmp_path):
    shared = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "model_max_length": 77}
    found = []
    for number, name in enumerate(CLASSES):
        model = {} if kind is None else {"model_type": kind}
        tokenizer = shared if name is None else {**shared, "tokenizer_class": name}
        found.append(same(folder_of(tmp_path / str(number), model, tokenizer)))
    assert any(each != "no tokenizer" for each in found)


@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [
        (None, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"model_type": "llama"}, None),
        ({"model_type": "llama"}, "{"),
        ("[]", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"model_type": "llama"}, "[1]"),
        ({"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}, {"eos_token": "<|endoftext|>"}),
        ({"model_type": "llama", "model_name": 7}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ],
    ids=str,
)
def test_files_that_lack_something(model, tokenizer, tmp_path):
    same(folder_of(tmp_path / "odd", model, tokenizer))


@pytest.mark.parametrize("folder", BUNDLED.values(), ids=BUNDLED)
def test_tokenizers_of_bundled_models_are_those_that_transformers_chooses(folder):
    assert same(folder) != "no tokenizer"


def test_the_class_of_the_models_configuration_is_not_imported():
    code = (
        "import sys; from flexbatch.models.resolve import DEMO, load_tokenizer; load_tokenizer(DEMO); "
        "import flexbatch.engine; "
        "heavy = ('transformers.models', 'accelerate', 'scipy.optimize', 'torch._dynamo', 'torch._inductor', "
        "'datasets', 'pyarrow', 'pandas', 'flexbatch.calibrate.host', 'flexbatch.calibrate.kernels'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
