"""Quantized checkpoints through the engine: their tokens, what is kept at how many bits, and what is said of it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.kernels import native_coded
from flexbatch.memory.weights import WeightStore
from flexbatch.models.described import describe
from flexbatch.models.opened import planned_model
from flexbatch.models.quantized.scheme import Form
from flexbatch.planner import planner
from tests.grids import sampled
from tests.quantized_writer import KINDS, SIZES, write_model
from tests.tiny_models import greedy_tokens, make_tokenizer, random_prompts

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PLACEMENTS = ((100, 0), (0, 100), (30, 40))


def made(name: str, folder: Path) -> Any:
    model = write_model(folder, KINDS[name], **SIZES)
    make_tokenizer().save_pretrained(folder)
    return model


def engine(folder: Path, percent: tuple[int, int] = (30, 40), **settings: Any) -> LLM:
    block = {"gpu_batch_size": 2, "num_gpu_batches": 2, "percent": (*percent, 100, 0, 100, 0)}
    budgets = {"device": "cpu", "gpu_memory": "1GiB", "cpu_memory": "1GiB"}
    return LLM(str(folder), offload_dir=str(folder / "offload"), **{**block, **budgets, **settings})


NAMES = (
    "int4-zeros",
    "bytes-rows-zeros",
    "gptq-desc-act",
    "gptq-3",
    "fp8-blocks",
    "float8-rows",
    "nf4-double",
    "bnb-int8",
)


@pytest.mark.parametrize(
    ("name", "percent"), sampled([(name, PLACEMENTS[index]) for name in NAMES for index in range(3)])
)
@torch.no_grad()
def test_tokens_are_those_of_the_weights_that_are_meant(name: str, percent: tuple[int, int], tmp_path: Path) -> None:
    """In float32, where scales are exact; a second start takes what the first one filed."""
    model, prompts = made(name, tmp_path), random_prompts([3, 20, 1])
    wanted = [greedy_tokens(model, prompt, 8, eos_token_id=None) for prompt in prompts]
    kept = {role: form for role, form in planned_model(describe(str(tmp_path))).prequantized.items()}
    for _ in range(2):
        with engine(tmp_path, percent) as llm:
            assert [completion.token_ids for completion in llm.generate(prompts, GREEDY)] == wanted
            for tensor in llm.engine_plan.weight_plan.all_tensors:
                assert tensor.form == kept.get(tensor.spec.role, Form(16, tensor.group))
            assert llm.planner.problem.shape.total_bytes(llm.policy.weight_bits) == sum(
                tensor.num_bytes for tensor in llm.engine_plan.weight_plan.all_tensors
            )
            llm.weights.check()


@pytest.mark.parametrize("few_in_codes", [True, False])
@torch.no_grad()
def test_tokens_are_the_same_whether_few_are_multiplied_in_codes(
    few_in_codes: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    """Of passes of few tokens, as a GPU has them. What is planned reaches the passes of every job."""
    model, prompts = made("int4", tmp_path), random_prompts([3, 20, 1, 9])
    wanted = [greedy_tokens(model, prompt, 8, eos_token_id=None) for prompt in prompts]
    asked, coded = list[bool](), WeightStore.coded
    monkeypatch.setattr(native_coded, "most_tokens", lambda dtype: 16)
    monkeypatch.setattr(WeightStore, "coded", lambda store, *place: asked.append(True) or coded(store, *place))
    with_choice = planner.with_faster_products

    def by_hand(problem: Any, choice: Any, known: Any) -> Any:
        assert with_choice(problem, choice, known).policy.few_in_codes, "a processor"
        return replace(choice, policy=replace(choice.policy, few_in_codes=few_in_codes))

    monkeypatch.setattr(planner, "with_faster_products", by_hand)
    with engine(tmp_path) as llm:
        for some in (prompts, prompts[:2]):
            found = [completion.token_ids for completion in llm.generate(some, GREEDY)]
            assert found == wanted[: len(some)] and bool(asked) == few_in_codes


@pytest.mark.parametrize(
    ("name", "asked", "stored", "percent"),
    [
        ("int8", 16, 8, None),
        ("int8", 4, 4, (3, 15)),
        ("int4-zeros", 4, 4, None),
        ("fp8-blocks", 8, 8, (0.1, 2)),
        ("nf4-double", 4, 4, (3, 15)),
    ],
    ids=str,
)
def test_fewer_bits_are_only_for_who_asks(
    name: str, asked: int, stored: int, percent: tuple[float, float] | None, tmp_path: Path, caplog: Any
) -> None:
    """percent: between these, weights change, and the log says by how much."""
    made(name, tmp_path)
    with caplog.at_level(logging.WARNING, "flexbatch"), engine(tmp_path, (100, 0), weight_bits=asked) as llm:
        llm.generate([[5, 6, 7]], GREEDY)
        tensors = {tensor.spec.role: tensor for tensor in llm.engine_plan.weight_plan.all_tensors}
    assert {tensors[role].bits for role in ("qkv.weight", "o.weight", "down.weight")} == {stored}
    found = re.findall(r"8 matrices .* in the (\d) bits of --weight-bits: .* changed by ([\d.]+) %", caplog.text)
    if percent is None:
        assert not found and "quantized anew" not in caplog.text
    else:
        [(bits, share)] = found
        assert int(bits) == asked and percent[0] < float(share) < percent[1]


@pytest.mark.parametrize(
    ("name", "dtype", "rounded"),
    [
        ("int4", "bfloat16", 0),  # scales of bfloat16, and -8 times these
        ("int4-zeros", "bfloat16", 8),  # minima with the bits of a zero point more
        ("int4-zeros", "float16", 0),
        ("gptq-sym", "bfloat16", 8),
        ("bnb-int8", "float16", 8),
    ],
)
def test_scales_that_lose_bits_are_told(name: str, dtype: str, rounded: int, tmp_path: Path, caplog: Any) -> None:
    made(name, tmp_path)
    with caplog.at_level(logging.WARNING, "flexbatch"), engine(tmp_path, (100, 0), dtype=dtype) as llm:
        llm.generate([[5, 6, 7]], GREEDY)
    found = re.findall(r"scales of (\d) quantized matrices are rounded to the \d+ bits of (\w+)", caplog.text)
    assert found == ([(str(rounded), dtype)] if rounded else [])


def test_the_log_says_what_is_kept_and_what_is_otherwise(tmp_path: Path, caplog: Any) -> None:
    made("fp8-blocks", tmp_path)
    with caplog.at_level(logging.INFO, "flexbatch"), engine(tmp_path, (100, 0)) as llm:
        llm.generate([[5, 6, 7]], GREEDY)
    assert "none kept in codes as they are, 14 in float8 by blocks of 48 x 40 expanded once" in caplog.text
    assert "activations are computed in the compute dtype" in caplog.text
