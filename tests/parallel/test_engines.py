"""Several engines over one line of prompts generate what one does: in order, with the same seeds, on all tiers."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.models.lora.request import LoRARequest
from flexbatch.request import CompletionOutput
from flexbatch.validation.errors import ConfigurationError, LostRankError
from tests.parallel.driver import SETTINGS
from tests.parallel.meshes import MIXED
from tests.parallel.test_lost_rank import parts, torchrun, wait_for_all
from tests.peft_folders import write_adapter
from tests.processes import Forked
from tests.tiny_models import make_model, random_prompts

PROMPTS = random_prompts([1, 5, 33, 70, 17, 40, 9, 22, 3, 60, 12, 11], seed=3)
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
KINDS = [GREEDY, SamplingParams(max_tokens=7, n=3, ignore_eos=True), SamplingParams(max_tokens=9, seed=5, logprobs=2)]
"""Greedy, three samples without a seed, and one with a seed: uneven work."""
PARAMS = [KINDS[i % 3] for i in range(len(PROMPTS))]
BLOCK = {"percent": MIXED, "gpu_batch_size": 2, "num_gpu_batches": 2, "prefill_chunk": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("engines")
    write_adapter(found / "adapter", make_model("llama", found / "model"), ["model.layers.0.self_attn.q_proj"])
    return found


def opened(folder: Path, engines: int, **settings: Any) -> LLM:
    settings = {**SETTINGS, **BLOCK, "offload_dir": str(folder / f"disk-{engines}"), **settings}
    return LLM(str(folder / "model"), data_parallel_size=engines, **settings)


def answers(llm: LLM, prompts: Any = PROMPTS, params: Any = PARAMS, **more: Any) -> list[Any]:
    found = llm.generate(prompts, params, **more)
    assert [each.prompt_token_ids for each in found] == list(prompts), "in order"
    return [[answer(one) for one in each.outputs] for each in found]


def answer(one: CompletionOutput) -> tuple[Any, ...]:
    """Of log-probabilities only the tokens: their last digits follow the block."""
    return one.token_ids, one.text, one.finish_reason, one.logprobs and [sorted(step) for step in one.logprobs]


def jobs_of(llm: LLM) -> list[Any]:
    """What several calls give, of each kind: a later one goes on with the numbers of prompts."""
    told: list[int] = []
    found = [answers(llm), answers(llm, on_prompt=lambda index, completion: told.append(index))]
    assert sorted(told) == list(range(len(PROMPTS)))
    items = [(f"row {i}", prompt, params) for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))]
    streamed = dict(llm.stream(items))
    found.append([[one.token_ids for one in streamed[key].outputs] for key, _, _ in items])
    for prompt in PROMPTS[:5]:
        llm.add_request(prompt, GREEDY, request_id=f"{len(prompt)}")
    dropped = f"{len(PROMPTS[3])}"
    ended = dict(llm.step())
    assert llm.abort(dropped)
    while llm.has_unfinished():
        ended |= dict(llm.step())
    assert dropped not in ended
    found.append({key: ended[key].token_ids for key in sorted(ended)})
    return found


def check(llm: LLM) -> dict[str, Any]:
    """The report, in which both engines did something, and all of it together."""
    others = llm._model.others
    assert others is not None
    others.line.check()
    assert not others.line.holdings and not len(others.line)
    report = llm.report()
    of_engines = report["engines"]
    assert len(of_engines) == 2 and all(each["generated_tokens"] for each in of_engines), of_engines
    for name in ("requests", "generated_tokens", "passes"):
        assert report[name] == sum(each[name] for each in of_engines)
    assert "engine 1" in str(report) and report["generated_tokens_per_second"] > 0
    return report


def test_two_engines_generate_what_one_does(folder):
    with opened(folder, 1) as llm:
        wanted = jobs_of(llm)
    with opened(folder, 2) as llm:
        assert jobs_of(llm) == wanted
        check(llm)
        with pytest.raises(ConfigurationError, match="on_tokens is told of every pass"):
            llm.stream([], on_tokens=print)
        with pytest.raises(ConfigurationError, match="adapters have to be known"):
            llm.generate(PROMPTS[0], GREEDY, lora_request=LoRARequest("new", 1, str(folder / "adapter")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recalibrate": True}, "data_parallel_size=2 leave it out"),
        ({"compare_plain": True, "draft": ["ngram"]}, "data_parallel_size=2 leave it out, and compare on one GPU"),
    ],
)
def test_what_engines_that_share_prompts_cannot_do_is_refused_before_they_start(settings, message, folder):
    with pytest.raises(ConfigurationError, match=message):
        opened(folder, 2, **settings)


SLOW = {
    "chain": {"draft": ["ngram"], "tree": "chain:3"},
    "tree": {"tree": "<2,2,1>", "percent": (50, 30, 30, 40, 50, 50)},
    "on the disk": {"percent": (0, 0, 0, 0, 0, 0)},
    "4 bits": {"weight_bits": 4, "cache_bits": 8},
    "bits that are chosen": {"allow_bits": (16, 8, 4), "percent": None, "gpu_memory": "2MiB", "cpu_memory": "8MiB"},
    "attention on the CPU": {"percent": (0, 100, 0, 100, 0, 100), "cpu_attention": 0.5},
    "ahead": {"percent": (100, 0, 100, 0, 100, 0), "async_scheduling": True},
    "chosen": {"percent": None, "gpu_batch_size": None, "num_gpu_batches": None, "prefill_chunk": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_speculation_tiers_and_bits(case, folder):
    settings = dict(SLOW[case])
    if "tree" in settings and "draft" not in settings:
        settings["draft"] = [str(folder / "model")]
    with opened(folder, 1, **settings) as llm:
        wanted = answers(llm)
    with opened(folder, 2, **settings) as llm:
        llm.prepare(PROMPTS, PARAMS)
        assert answers(llm) == wanted
        check(llm)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 2), (2, 2, 1), (4, 1, 1)], ids=["2 x tensor 2", "2 x 2 stages", "4"])
def test_engines_of_several_ranks(sizes, folder):
    data, pipeline, tensor = sizes
    with opened(folder, 1) as llm:
        wanted = answers(llm)
    with opened(folder, data, pipeline_parallel_size=pipeline, tensor_parallel_size=tensor) as llm:
        found = answers(llm)
        assert [[one[:3] for one in each] for each in found] == [[one[:3] for one in each] for each in wanted]
        assert len(llm.report()["engines"]) == data


@pytest.mark.slow
def test_an_engine_that_is_free_takes_what_a_busy_one_has_not_begun(folder):
    """One prompt takes as long as all others together."""
    long = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
    short = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    with opened(folder, 2, gpu_batch_size=1, num_gpu_batches=1) as llm:
        llm.prepare(PROMPTS[:2], long)
        answers(llm, [PROMPTS[0], *PROMPTS * 2], [long, *[short] * 24])
        counts = sorted(each["requests"] for each in check(llm)["engines"])
        assert counts[0] <= 8 and counts[1] >= 17, counts


def test_a_lost_engine_ends_the_call_and_is_named(folder):
    with contextlib.suppress(LostRankError), opened(folder, 2) as llm:
        others = llm._model.others
        assert others is not None and others.processes is not None
        other = others.processes.processes[0]

        def kill(index: int, completion: Any) -> None:
            other.kill()

        began = time.monotonic()
        with pytest.raises(LostRankError, match="rank 1 was killed by SIGKILL"):
            for _ in range(50):
                answers(llm, on_prompt=kill)
        assert time.monotonic() - began < 30


def words(folder: Path, rows: Path, out: Path, engines: int) -> list[str]:
    found = [str(rows), str(out), "--model", str(folder / "model"), "--device", "cpu", "--hardware", "cpu"]
    found += ["--dtype", "float32", "--part-rows", "4", "--max-tokens", "40", "--ignore-eos", "--temperature", "1"]
    found += ["--gpu-batch-size", "2", "--num-gpu-batches", "1", "--gpu-memory", "256MiB", "--cpu-memory", "256MiB"]
    found += ["--percent", "50", "50", "50", "50", "100", "0", "--offload-dir", str(out.with_name(f"{out.name}-disk"))]
    return [*found, "--data-parallel-size", str(engines)]


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True], ids=["started", "torchrun"])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_batch_job_whose_engine_was_killed_goes_on_to_the_same_bytes(killed, launched, folder, tmp_path):
    import psutil

    rows, out = tmp_path / "rows.parquet", tmp_path / "out"
    # Enough that a busy machine comes to killing one before the others have done them all.
    pq.write_table(pa.table({"prompt": [" ".join(map(str, prompt)) for prompt in PROMPTS] * 6}), rows)
    given = words(folder, rows, out, 2)

    def start() -> list[Forked]:
        module = "flexbatch.apps.batch"
        return torchrun(module, given, 2) if launched else [Forked(module, given)]

    ranks = start()
    end = time.monotonic() + 100
    while len(parts(out)) < 2 and time.monotonic() < end and ranks[0].poll() is None:
        time.sleep(0.02)
    children = [] if launched else psutil.Process(ranks[0].pid).children()
    (ranks[killed] if launched or not killed else children[0]).kill()
    said = wait_for_all(ranks)
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert all(rank.returncode for rank in ranks) and 0 < len(parts(out)) < 18, said
    if killed:
        assert "flexbatch.apps.batch" in said[0] and ("is gone" in said[0] or "rank 1 was killed" in said[0]), said
    ranks = start()
    said = [rank.communicate(200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), said
    alone = Forked("flexbatch.apps.batch", words(folder, rows, tmp_path / "alone", 1))
    assert alone.communicate(200) and alone.returncode == 0
    assert parts(out) == parts(tmp_path / "alone") and len(parts(out)) == 18


@pytest.mark.slow
def test_the_command_shares_its_prompts_and_reports_once(folder, tmp_path):
    base = ["--model", str(folder / "model"), "--device", "cpu", "--hardware", "cpu", "--dtype", "float32", "--json"]
    base += ["--prompt-len", "9", "--limit", "24", "--gen-len", "12", "--ignore-eos", "--gpu-memory", "256MiB"]
    base += ["--gpu-batch-size", "2", "--num-gpu-batches", "2", "--percent", *["100", "0"] * 3]
    found = []
    for engines in ("1", "2"):
        command = Forked("flexbatch.run", [*base, "--data-parallel-size", engines])
        out, said = command.communicate(200)
        assert command.returncode == 0, said
        assert "24 of 24 completions" in said and f"{24 * 12:,} written" in said, said
        found.append(json.loads(out))
    assert found[0]["completions"] == found[1]["completions"]
    assert found[1]["report"]["requests"] == 24 and len(found[1]["report"]["engines"]) == 2
