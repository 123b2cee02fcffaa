"""Settings, reports and ends of jobs with speculation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.planner import tables
from flexbatch.speculative.tree import TokenTree
from flexbatch.validation.errors import ConfigurationError, DoesNotFitError
from tests.speculative.engines import GREEDY, Scripted, engine, tokens
from tests.tiny_models import make_model, make_tokenizer


def test_simulated_acceptance_is_labeled(reference, other, tmp_path):
    model = reference("llama")
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=1)
    with engine(model, tmp_path, draft=(str(other),), tree="chain:4", simulate_acceptance=0.8) as llm:
        completions = llm.generate(model.prompts, params)
        text = tables.speculation(llm.report())
        report = llm.report()["speculation"]
    assert report["simulated_acceptance"] == 0.8 and "SIMULATED acceptance 0.8" in text.splitlines()[0]
    assert all(len(completion.token_ids) == len(completion.logprobs) == 40 for completion in completions)
    # 1 + 0.8 + 0.8^2 + 0.8^3 + 0.8^4 = 3.36, less what the ends cut off.
    assert 2.7 < report["tokens_per_sequence_pass"] < 3.7


def test_compare_plain_measures_both_in_one_run(reference, tmp_path):
    model = reference("llama")
    with engine(model, tmp_path, draft=(str(model.folder),), tree="chain:3", compare_plain=True) as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        report = llm.report()
    speculation, text = report["speculation"], tables.speculation(report)
    assert 0 < speculation["draft_share_of_time"] < 1
    for words in (
        "accepted, greedy",
        "child 1",
        "depth 3",
        "tokens per sequence and pass",
        "drafting, % of time",
        "speed-up over plain",
    ):
        assert words in text
    assert speculation["plain_passes"] > report["passes"] and speculation["speed_up"] > 0
    assert report["requests"] == len(model.prompts), "the plain run is not counted twice"
    read = sum(len(prompt) for prompt in model.prompts)
    assert llm._loop.comparison.kept_baseline.prefilled_tokens == llm.statistics.prefilled_tokens == read, (
        "no run finds the prompts that another one has read"
    )


def test_wrong_settings_are_refused_before_anything_is_loaded(reference, tmp_path):
    model = reference("llama")
    strange = tmp_path / "strange"
    make_model("llama", strange, vocab_size=310, seed=1)
    make_tokenizer(310).save_pretrained(strange)
    (strange / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ConfigurationError, match=r"different tokenizers \(310 and 307 tokens"):
        engine(model, tmp_path, draft=(str(strange),))
    with pytest.raises(ConfigurationError, match="needs a draft"):
        engine(model, tmp_path, tree="chain:3")
    with pytest.raises(ConfigurationError, match="needs a draft"):
        engine(model, tmp_path, simulate_acceptance=0.5)
    with pytest.raises(ConfigurationError, match="not a tree"):
        engine(model, tmp_path, draft=("ngram",), tree="bush:3")
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        engine(model, tmp_path, draft=("ngram",), simulate_acceptance=1.5)


def test_random_weights_need_vocabularies_of_one_size(tmp_path):
    """Without tokenizers, and before any of the 30 billion weights are made."""
    settings = {"dummy_weights": True, "device": "cpu", "offload_dir": str(tmp_path), "gpu_memory": "1GiB"}
    with pytest.raises(ConfigurationError, match="draft llama-2-7b has 32000 tokens and opt-30b has 50272"):
        LLM("opt-30b", draft=("llama-2-7b",), **settings)


def test_drafts_count_toward_the_budget_of_the_gpu(reference, other, tmp_path):
    """The target alone fits; with a draft the plan is refused with the draft's rows in the table."""
    model = reference("llama")
    with engine(model, tmp_path, gpu_memory="32MiB") as llm:
        assert tokens(llm, model.prompts) == model.token_ids
    with (
        pytest.raises(DoesNotFitError, match=r"(?s)does not fit.*draft weights .*draft workspace "),
        engine(model, tmp_path, gpu_memory="32MiB", draft=(str(other),)) as llm,
    ):
        llm.generate(model.prompts, GREEDY)
    with engine(model, tmp_path, draft=(str(other),), tree="chain:2") as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        assert llm.report()["peak_bytes"]["gpu"] > llm.speculator.peak_bytes > 0


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_the_first_layers_travel_while_the_draft_works(placement, reference, tmp_path):
    model = reference("llama")
    fetched = []

    def looking(sequence, depth):
        fetched.append(sorted(llm.weights.leases))
        return TokenTree()

    with engine(model, tmp_path, placement, draft=("ngram",), tree="chain:2") as llm:
        llm.speculator.sources = [Scripted(looking)]
        assert tokens(llm, model.prompts) == model.token_ids
    assert len(fetched) > 5 and all(layers == [0, 1] for layers in fetched[1:])


def test_an_abandoned_job_leaves_nothing_behind(reference, tmp_path):
    model = reference("llama")
    with engine(model, tmp_path, draft=(str(model.folder), "ngram"), tree="chain:2") as llm:
        items = ((i, prompt, GREEDY) for i, prompt in enumerate(model.prompts))
        stream = llm.stream(items)
        next(stream)
        stream.close()
        assert not llm.speculator.sources[0].followed and not llm.speculator.sources[1].lookups
        assert tokens(llm, model.prompts) == model.token_ids


HUMANEVAL = Path(__file__).parents[1] / "data" / "humaneval.jsonl"


def run_demo(folder: Path, **settings) -> tuple[list[list[int]], dict]:
    """Tokens for real prompts, and the report, with weights on disk."""
    prompts = [json.loads(line)["prompt"] for line in HUMANEVAL.read_text().splitlines()[:6]]
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    with LLM(
        "demo",
        percent=(0, 0, 100, 0, 100, 0),
        gpu_batch_size=6,
        num_gpu_batches=1,
        gpu_memory="1GiB",
        cpu_memory="1GiB",
        offload_dir=str(folder),
        device="cpu",
        **settings,
    ) as llm:
        return [completion.token_ids for completion in llm.generate(prompts, params)], llm.report()


@pytest.fixture(scope="module")
def plain_demo(tmp_path_factory) -> list[list[int]]:
    return run_demo(tmp_path_factory.mktemp("demo"))[0]


@pytest.mark.parametrize(
    "draft",
    [
        ("demo-draft",),
        pytest.param(("ngram",), marks=pytest.mark.slow),
        pytest.param(("demo-draft", "ngram"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_the_demo_pair_saves_passes_on_real_prompts(draft, plain_demo, tmp_path):
    """The ratio of seconds is reported, and asserted nowhere: it belongs to the machine."""
    fast, report = run_demo(tmp_path, draft=draft, tree="chain:4", compare_plain=True)
    assert plain_demo == fast
    run = report["speculation"]
    assert (
        run["tokens_per_sequence_pass"] > 1.3 and report["passes"] < 0.9 * run["plain_passes"] and run["speed_up"] > 0
    )


def test_a_prepared_engine_reports_before_its_first_pass(reference, tmp_path):
    """The benchmark asks between the two: whatever was allocated, nothing has run."""
    model = reference("llama")
    with engine(model, tmp_path, "mixed", draft=("ngram",)) as llm:
        llm.prepare(model.prompts, GREEDY)
        report = llm.report()
        assert report["passes"] == 0 and report["realized_percent"]["activations"] == {"gpu": 0, "cpu": 0, "disk": 0}
        assert report["speculation"]["costs"] == {"pass_seconds": [], "draft_level_seconds": []}
        tokens(llm, model.prompts)
        assert llm.report()["realized_percent"]["activations"]["cpu"] > 0
