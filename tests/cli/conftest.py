"""A tiny random Llama with a byte-level tokenizer, as a model folder; and no traces of one command in the next."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexbatch import run

CONTEXT = 96


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting of the developer's shell, and signal handlers and log handlers as before."""
    for name in list(os.environ):
        if name.startswith("FLEXBATCH_"):
            monkeypatch.delenv(name)
    previous, handlers = signal.getsignal(signal.SIGTERM), logging.getLogger().handlers[:]
    yield
    signal.signal(signal.SIGTERM, previous)
    logging.getLogger().handlers[:] = handlers


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*alphabet, "<s>", "</s>"])}, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=259, max_position_embeddings=CONTEXT, bos_token_id=256, eos_token_id=257, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def command(model_folder: Path) -> Callable[..., int]:
    """Runs the command on the tiny model in this process; returns its exit code."""

    def start(*words: str) -> int:
        fixed = ["--device", "cpu", "--hardware", "cpu"]
        return run.main(
            [
                "--model",
                str(model_folder),
                *fixed,
                "--gpu-memory",
                "64MiB",
                "--cpu-memory",
                "64MiB",
                "--max-tokens",
                "6",
                *words,
            ]
        )

    return start
