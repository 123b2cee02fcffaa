"""Budgets hold: what a run allocates on the compute device beside its weights stays within the plan, whatever is
asked of the logits."""

from __future__ import annotations

import random
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexbatch import LLM, SamplingParams
from flexbatch.execution.logprobs import token_logprobs
from flexbatch.execution.sampling import process_logits, sample
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.transfer import ThreadQueue
from flexbatch.models.shapes import SHAPES
from flexbatch.policy.limits import SAMPLING_BYTES_PER_LOGIT
from flexbatch.request import Request
from flexbatch.speculative.draft import SCORING_BYTES_PER_LOGIT, DraftModel
from flexbatch.speculative.scoring import likeliest
from flexbatch.speculative.stochastic import drawn_children
from flexbatch.speculative.tree import Drawing
from tests.grids import grid
from tests.tiny_models import make_model, random_prompts

GREEDY: dict[str, Any] = {"temperature": 0.0}
RANDOM: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 1e-4, "repetition_penalty": 1.1}
SCORED: dict[str, Any] = {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 3}
VOCAB = 6000
TINY = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 2, "vocab_size": VOCAB}
RESIDENT = (100, 0, 100, 0, 100, 0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, from their making until nothing refers to their storage."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            pointer, num_bytes = storage.data_ptr(), storage.nbytes()
            if pointer and pointer not in self.live:
                self.live.add(pointer)
                self.now += num_bytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, pointer, num_bytes)
        return result

    def free(self, pointer: int, num_bytes: int) -> None:
        self.live.discard(pointer)
        self.now -= num_bytes


class Everywhere(LiveBytes):
    """On worker threads too, where attention on the CPU runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.lock = threading.RLock()
        traced, outer = ThreadQueue.traced, self

        class Worker(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return outer.__torch_dispatch__(func, types, args, kwargs)

        def watched(self: ThreadQueue, *arguments: Any) -> Any:
            with Worker():
                return traced(self, *arguments)

        monkeypatch.setattr(ThreadQueue, "traced", watched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.lock:
            return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize(
    ("placement", "draft"),
    grid([RESIDENT, (100, 0, 0, 100, 100, 0)], [{}, {"draft": ("ngram",), "tree": "best-first:30"}]),
    ids=str,
)
def test_long_contexts_and_trees_stay_within_their_plan(placement, draft, monkeypatch, tmp_path):
    """Small heads in number, so that partial results and rotary tables are what a run takes most of."""
    make_model(
        "llama",
        tmp_path / "model",
        vocab_size=307,
        max_position_embeddings=1_000_000,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=32,
    )
    settings: dict[str, Any] = {
        "gpu_batch_size": 4,
        "num_gpu_batches": 2,
        "prefill_chunk": 64,
        "cpu_attention": 0.0 if placement is RESIDENT else 1.0,
    }
    budgets: dict[str, Any] = {"gpu_memory": "1GiB", "cpu_memory": "1GiB", "offload_dir": str(tmp_path)}
    bytes_ = Everywhere(monkeypatch)
    with LLM(
        str(tmp_path / "model"), device="cpu", dtype="float32", percent=placement, **settings, **budgets, **draft
    ) as llm:
        with bytes_:
            llm.generate(
                random_prompts([900, 40, 1300, 5, 700], 307, seed=3),
                SamplingParams(max_tokens=6, temperature=0, ignore_eos=True),
            )
        assert bytes_.peak <= needs_beside_weights(llm)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(3)
    return random_prompts([rng.randint(16, 40) for _ in range(count)], VOCAB, seed=3)


def needs_beside_weights(llm: LLM) -> int:
    """On the gpu and the cpu tier: without a GPU both are this process's memory."""
    rows = [
        row
        for row in llm.report()["memory"]
        if row["tier"] != "disk" and not row["what"].startswith(("weights", "draft weights"))
    ]
    return sum(row["num_bytes"] for row in rows)


@pytest.mark.parametrize(
    ("params", "draft"),
    grid(
        [GREEDY, RANDOM, SCORED],
        [{}, {"draft": ("ngram",)}, {"draft": ("d",)}, {"draft": ("d",), "draft_sampling": "independent"}],
    ),
    ids=str,
)
def test_a_run_stays_within_its_plan(params, draft, monkeypatch, tmp_path):
    monkeypatch.setitem(SHAPES, "t", SHAPES["opt-125m"] | TINY | {"num_hidden_layers": 3})
    monkeypatch.setitem(SHAPES, "d", SHAPES["opt-125m"] | TINY | {"num_hidden_layers": 1})
    tree = {"tree": "<2,1,1>" if draft.get("draft_sampling") else "<2,2,1>"} if draft else {}
    off_gpu = params is not GREEDY
    with LLM(
        "t",
        dummy_weights=True,
        device="cpu",
        dtype="float32",
        percent=(0, 100, 50, 50, 0, 100) if off_gpu else RESIDENT,
        gpu_batch_size=64,
        num_gpu_batches=1,
        prefill_budget=512,
        gpu_memory="4GiB",
        cpu_memory="1GiB",
        offload_dir=str(tmp_path),
        **draft,
        **tree,
    ) as llm:
        assert llm.weights is not None, "they lie where they belong before anything is counted"
        with LiveBytes() as bytes_:
            completions = llm.generate(prompts(64), SamplingParams(max_tokens=4, ignore_eos=True, **params))
        assert bytes_.peak <= needs_beside_weights(llm)
        assert [len(completion.token_ids) for completion in completions] == [4] * 64


def states(count: int, params: dict[str, Any]) -> list[Sequence]:
    return [Sequence(Request(i, [3, 5, 5, 7], SamplingParams(max_tokens=100, **params))) for i in range(count)]


KINDS = [
    GREEDY,
    RANDOM,
    SCORED,
    {"temperature": 0.7},
    {"temperature": 1.3, "top_p": 0.5},
    {"temperature": 0.0, "frequency_penalty": 0.5},
]


@pytest.mark.parametrize("params", KINDS, ids=str)
@torch.inference_mode()
def test_sampling_takes_what_the_plan_counts_for_a_logit(params):
    rows = 16
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1))
    drawing = states(rows, params)

    def bytes_per_logit(call: Any) -> float:
        with LiveBytes(logits) as bytes_:
            call()
        # Indices of the rows are not counted.
        return (bytes_.peak - 64 * rows) / logits.numel()

    assert bytes_per_logit(lambda: sample(logits, drawing)) <= SAMPLING_BYTES_PER_LOGIT
    assert bytes_per_logit(lambda: token_logprobs(logits, [7] * rows, [5] * rows)) <= SAMPLING_BYTES_PER_LOGIT
    # Its result, 4 bytes a logit, is counted with the tree that is judged.
    assert bytes_per_logit(lambda: process_logits(logits, drawing)) <= 4 + SAMPLING_BYTES_PER_LOGIT
    assert bytes_per_logit(lambda: likeliest(logits.clone(), drawing, [()] * rows, 3)) <= SCORING_BYTES_PER_LOGIT
    if params is RANDOM:
        assert bytes_per_logit(lambda: sample(logits, drawing)) > 0.8 * SAMPLING_BYTES_PER_LOGIT, (
            "the plan counts too much"
        )


@torch.inference_mode()
def test_drawing_children_takes_what_the_plan_counts_for_them():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    for count in (1, 2, 5):
        with LiveBytes(logits) as bytes_:
            _, distribution = drawn_children(logits, states(1, RANDOM)[0], (), -1, count, Drawing.INDEPENDENT)
        assert bytes_.peak <= (28 * count + 40) * VOCAB + 256
        assert distribution.untyped_storage().nbytes() == 4 * VOCAB


def test_what_children_were_drawn_from_is_planned(monkeypatch, tmp_path):
    monkeypatch.setitem(SHAPES, "t", SHAPES["opt-125m"] | TINY | {"num_hidden_layers": 2})
    monkeypatch.setitem(SHAPES, "d", SHAPES["opt-125m"] | TINY | {"num_hidden_layers": 1})
    kept = []
    draft = DraftModel.draft

    def watched(self: DraftModel, *arguments: Any) -> Any:
        trees = draft(self, *arguments)
        kept.append(
            sum(x.untyped_storage().nbytes() for placements in self.distributions.values() for x in placements.values())
        )
        return trees

    monkeypatch.setattr(DraftModel, "draft", watched)
    settings = {
        "draft": ("d",),
        "tree": "<2,2,1>",
        "draft_sampling": "without-replacement",
        "gpu_batch_size": 8,
        "num_gpu_batches": 2,
    }
    with LLM(
        "t", dummy_weights=True, device="cpu", dtype="float32", percent=RESIDENT, gpu_memory="4GiB", **settings
    ) as llm:
        llm.generate(prompts(20), SamplingParams(max_tokens=5, ignore_eos=True, temperature=1.0))
        (planned,) = [row["num_bytes"] for row in llm.report()["memory"] if row["what"] == "draft distributions"]
    assert planned / 3 < max(kept) <= planned
