"""Mixtures of experts through the commands, as they are published: a batch job and the evaluation harness."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexbatch.apps.batch import main
from tests.apps_batch.helpers import read_output, write_input
from tests.mxfp4_writer import make_packed
from tests.tiny_models import greedy_tokens, make_model, make_tokenizer

TEXTS = ["def add(a, b):", "import os", "a", "return the best of them"]


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@torch.no_grad()
def test_a_batch_job(family: str, tmp_path: Path) -> None:
    """gpt-oss in MXFP4; greedy tokens are those of transformers."""
    folder = tmp_path / "model"
    model = make_packed(folder) if family == "gpt_oss" else make_model(family, folder)
    source = write_input(tmp_path / "in.parquet", TEXTS)
    flags = ("--percent", "30", "40", "50", "50", "100", "0", "--gpu-batch-size", "2", "--num-gpu-batches", "1")
    words = ("--model", str(folder), "--device", "cpu", "--max-tokens", "5", "--temperature", "0", *flags)
    assert main([str(source), str(tmp_path / "out"), "--generated-tokens", *words]) == 0
    tokenizer = make_tokenizer()
    for text, row in zip(TEXTS, read_output(tmp_path / "out").to_pylist(), strict=True):
        assert row["generated_tokens"] == greedy_tokens(model, tokenizer(text).input_ids, 5)


@torch.no_grad()
def test_the_evaluation_harness(tmp_path: Path) -> None:
    """Log-likelihoods of gpt-oss in MXFP4 are those of its expansion in the harness's own model."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from flexbatch.apps.lm_eval_model import FlexBatchLM

    make_packed(tmp_path / "packed", tmp_path / "expanded")
    pairs = [("red ale", " dark"), ("what is", " this thing"), ("a", " bed")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    wanted = HFLM(pretrained=str(tmp_path / "expanded"), device="cpu", dtype="float32").loglikelihood(asked)
    found = FlexBatchLM(str(tmp_path / "packed"), device="cpu", dtype="float32").loglikelihood(asked)
    for (mine, greedy), (theirs, also) in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4) and greedy is also
