"""Streams whose later requests are longer than those that the block was sized for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.execution.scheduler import Scheduler
from flexbatch.planner.capacity import PEEKED_BLOCKS
from flexbatch.text.prompts import PromptError
from tests.tiny_models import make_model, random_prompts

PLACEMENTS = {
    "gpu": (100, 0, 100, 0, 100, 0),
    "cpu": (100, 0, 0, 100, 100, 0),
    "disk": (100, 0, 0, 0, 100, 0),
    "mixed": (50, 30, 30, 40, 50, 20),
}
BLOCK = {"gpu_batch_size": 3, "num_gpu_batches": 2}
PEEKED = PEEKED_BLOCKS * 6
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SMALL, LARGE = 20, 90
SETTLED = {"prefill_chunk": 64, "prefill_budget": 64, "cpu_attention": 0.0}
BUDGETS = {"gpu_memory": "1GiB", "cpu_memory": "1GiB"}


@pytest.fixture
def checked(monkeypatch) -> list[Scheduler]:
    """Every batcher of the test, each checked after every admission."""
    found: list[Scheduler] = []

    def admit(self: Scheduler, plain=Scheduler.admit) -> None:
        found.extend([self] if self not in found else [])
        plain(self)
        self.check()

    monkeypatch.setattr(Scheduler, "admit", admit)
    return found


def engine(folder, tmp_path, placement: str = "gpu", **settings) -> LLM:
    return LLM(
        str(folder),
        percent=PLACEMENTS[placement],
        device="cpu",
        offload_dir=str(tmp_path),
        **{**BLOCK, **BUDGETS, **settings},
    )


def items(prompts: list[list[int]], params: SamplingParams = PARAMS) -> Iterator[tuple[int, list[int], SamplingParams]]:
    return ((i, prompt, params) for i, prompt in enumerate(prompts))


def lengths(rest: list[int]) -> list[int]:
    """What the engine looks at before it makes its block is short."""
    return [SMALL] * PEEKED + rest


@pytest.fixture(scope="module")
def longer(reference, tmp_path_factory) -> tuple[list[list[int]], list[list[int]]]:
    """Requests of which some are twice as long as the first ones, and their tokens."""
    prompts = random_prompts(lengths([45 if i % 3 == 0 else SMALL for i in range(30)]), seed=3)
    with engine(reference("llama").folder, tmp_path_factory.mktemp("longer")) as llm:
        return prompts, [completion.token_ids for completion in llm.generate(prompts, PARAMS)]


EXTRAS = [{}, {"cpu_attention": 0.5}, {"draft": ("ngram",), "tree": "chain:3"}, {"cache_bits": 8}]
QUICK = [("gpu", 2), ("cpu", 0), ("disk", 3), ("mixed", 1)]
"""Every placement and every setting, and those together that touch each other's staging."""


@pytest.mark.parametrize(
    ("placement", "settings"),
    [
        pytest.param(placement, settings, marks=() if (placement, index) in QUICK else pytest.mark.slow)
        for placement in PLACEMENTS
        for index, settings in enumerate(EXTRAS)
    ],
    ids=str,
)
def test_longer_requests_share_the_block_as_far_as_pages_and_staging_go(
    placement, settings, longer, reference, tmp_path, checked
):
    """The pools hold them, and staging holds one or two in each micro-batch."""
    prompts, expected = longer
    with engine(reference("llama").folder, tmp_path, placement, **settings) as llm:
        found = dict(llm.stream(items(prompts)))
        llm.runner.check()
    assert not any(completion.error for completion in found.values())
    if "cache_bits" not in settings:
        assert [found[i].token_ids for i in range(len(prompts))] == expected


@pytest.fixture(scope="module")
def outgrowing(reference, tmp_path_factory) -> tuple[list[list[int]], list[list[int]]]:
    """Requests of which some are many times as long as the first ones, and their tokens."""
    rest = [SMALL, 400, SMALL, SMALL, LARGE, 490, *[SMALL] * 20, 400, SMALL]
    prompts = random_prompts(lengths(rest), seed=4)
    with engine(reference("llama").folder, tmp_path_factory.mktemp("outgrowing")) as llm:
        return prompts, [completion.token_ids for completion in llm.generate(prompts, PARAMS)]


@pytest.mark.parametrize("placement", [pytest.param("gpu", marks=pytest.mark.slow), "cpu", "disk", "mixed"])
def test_a_request_that_outgrows_the_block_gets_a_larger_one(placement, outgrowing, reference, tmp_path, checked):
    prompts, expected = outgrowing
    with engine(reference("llama").folder, tmp_path, placement) as llm:
        found = dict(llm.stream(items(prompts)))
        llm.runner.check()
        assert llm.report()["requests"] == len(prompts)
    assert [found[i].token_ids for i in range(len(prompts))] == expected
    assert len(checked) == 2, "one larger block: what lay ahead was looked at when it was made"


def test_blocks_grow_and_do_not_shrink_by_turns(reference, tmp_path, checked):
    waves = [250] + [SMALL] * PEEKED * 2 + [250] + [SMALL] * PEEKED * 2 + [490] + [SMALL] * PEEKED * 2 + [250, 490]
    prompts = random_prompts(lengths(waves), seed=5)
    with engine(reference("llama").folder, tmp_path) as llm:
        found = dict(llm.stream(items(prompts, SamplingParams(temperature=0, max_tokens=2))))
    assert len(checked) == 3 and not any(completion.error for completion in found.values())


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A model with a context of 2048 tokens, and the GPU bytes of a block for one request of 900."""
    folder = tmp_path_factory.mktemp("roomy")
    make_model("llama", folder, max_position_embeddings=2048)
    memory = LLM.plan(
        EngineConfig(model=str(folder), percent=PLACEMENTS["gpu"], device="cpu", **BLOCK, **SETTLED, **BUDGETS),
        Job((900,), (900,)),
    )["memory"]
    return folder, sum(need["num_bytes"] for need in memory if need["tier"] == "gpu")


def test_requests_that_no_budget_holds_are_errors_and_drain_nothing(roomy, tmp_path, checked):
    folder, budget = roomy
    prompts = random_prompts(lengths([SMALL, 1500, SMALL, 700, 950, 690, SMALL]), seed=6)
    bad = [PEEKED + 1, PEEKED + 4]
    with engine(folder, tmp_path) as llm:
        expected = [completion.token_ids for completion in llm.generate(prompts, PARAMS)]
    checked.clear()
    with engine(folder, tmp_path, gpu_memory=budget, **SETTLED) as llm:
        found = dict(llm.stream(items(prompts)))
        assert llm.tiers.gpu.peak_bytes <= budget
    assert sorted(i for i, completion in found.items() if completion.error) == bad
    assert (
        "1500 prompt and up to 6 generated tokens need" in found[bad[0]].error
        and "iB more on the gpu tier than its budget of" in found[bad[0]].error
    )
    assert all(found[i].token_ids == expected[i] for i in found if i not in bad)
    assert len(checked) == 2, (
        "the request of 700 tokens, which fits, has the block made anew; that of 690, which does not fit beside it, "
        "waits"
    )


def test_a_refused_request_among_the_first_does_not_refuse_the_stream(roomy, tmp_path):
    folder, budget = roomy
    with engine(folder, tmp_path, gpu_memory=budget, **SETTLED) as llm:
        found = dict(llm.stream(items(random_prompts([SMALL, 1500, SMALL, 1400], seed=7))))
        alone = dict(llm.stream(items(random_prompts([1500], seed=7))))
    assert [bool(found[i].error) for i in range(4)] == [False, True, False, True] and alone[0].error


@pytest.mark.parametrize("settings", [{}, {"draft": ("ngram",), "tree": "chain:3"}], ids=str)
def test_text_is_handed_on_once_and_never_taken_back(settings, roomy, tmp_path):
    """Of the first sample of every item, with stop strings that the text begins again and again."""
    prompts = random_prompts([SMALL + i for i in range(7)], seed=9)
    drawn = SamplingParams(temperature=0.9, max_tokens=24, ignore_eos=True, seed=9)
    with engine(roomy[0], tmp_path, **settings) as llm:
        plain = [completion.text for completion in llm.generate(prompts, drawn)]
        stops = [(text[9:12], text[4:8] + "~", text[11:] + "~") for text in plain]
        params = [dataclasses.replace(drawn, stop=stop, n=1 + i % 3) for i, stop in enumerate(stops)]
        heard: dict[int, list[str]] = {i: [] for i in range(len(prompts))}
        found = dict(
            llm.stream(
                ((i, prompt, params[i]) for i, prompt in enumerate(prompts)), lambda key, text: heard[key].append(text)
            )
        )
    assert {i: "".join(texts) for i, texts in heard.items()} == {i: completion.text for i, completion in found.items()}
    assert all(texts and all(texts) for texts in heard.values()) and sum(map(len, heard.values())) > 2 * len(prompts)
    assert any(completion.stop_reason for completion in found.values())


def test_parameters_that_the_model_cannot_follow_fail_their_item_alone(roomy, tmp_path):
    prompts = random_prompts([SMALL] * 3, seed=8)
    with engine(roomy[0], tmp_path) as llm:
        biased = dataclasses.replace(PARAMS, logit_bias={10**6: 1.0})
        found = dict(llm.stream((i, prompt, biased if i == 1 else PARAMS) for i, prompt in enumerate(prompts)))
        with pytest.raises(PromptError, match="prompt 1: logit_bias names token id 1000000"):
            llm.generate(prompts, [PARAMS, biased, PARAMS])
    assert found[1].finish_reason == "error" and "logit_bias names token id 1000000" in found[1].error
    assert len(found[0].token_ids) == len(found[2].token_ids) > 0


def test_a_chosen_policy_is_chosen_again_for_a_larger_block(reference, tmp_path, checked, monkeypatch):
    """Nothing is given but little memory: the policy of the short requests has no room for the long one, another
    has."""
    folder = reference("llama").folder
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    with LLM(
        str(folder), device="cpu", offload_dir=str(tmp_path), hardware="cpu", gpu_memory="2400KiB", cpu_memory="1MiB"
    ) as llm:
        monkeypatch.setattr("flexbatch.planner.capacity.FIRST_LOOK", 40)
        short = [4] * 200
        prompts = random_prompts([*short, 480, *short[:20], 300], seed=9)
        found = dict(llm.stream(items(prompts, params)))
        assert llm.tiers.gpu.peak_bytes <= 2400 * 2**10 and llm.tiers.cpu.peak_bytes <= 2**20
    assert not any(completion.error for completion in found.values()) and len(checked) > 1
    with engine(folder, tmp_path) as llm:
        long = [len(short), len(prompts) - 1]
        assert [found[i].token_ids for i in long] == [
            completion.token_ids for completion in llm.generate([prompts[i] for i in long], params)
        ]


def test_a_draft_without_room_proposes_nothing(reference, tmp_path, checked):
    """The draft's cache is sized by the same requests as the block; with 41 tokens, four fit the block, three the
    draft: 48 rows and 49."""
    model = reference("llama")
    prompts = random_prompts(lengths([41] * 20 + [300, SMALL]), seed=8)
    with engine(model.folder, tmp_path) as llm:
        expected = [completion.token_ids for completion in llm.generate(prompts, PARAMS)]
    with engine(model.folder, tmp_path, "cpu", draft=(str(model.folder),), tree="chain:2") as llm:
        found = dict(llm.stream(items(prompts)))
        llm.speculator.check()
    assert [found[i].token_ids for i in range(len(prompts))] == expected
