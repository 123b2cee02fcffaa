"""The closed form against hand-computed passes and against itself; test_cost_against_executor.py has the executor."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flexbatch.policy.affine import point_of
from flexbatch.policy.attention_seconds import KEYS_OF_SEQUENCE
from flexbatch.policy.beside import IN_VIEW, STREAMED_IN_VIEW, WAITING_IN_VIEW
from flexbatch.policy.cost import PassModel
from flexbatch.policy.curve import Curve
from flexbatch.policy.decode_graphs import LAUNCHES_OF_EXPERTS
from flexbatch.policy.expansion import CODED_TILES, coded_seconds
from flexbatch.policy.hardware import Hardware, load_hardware
from flexbatch.policy.host_work import PROMPT_TOKEN_SHARE
from flexbatch.policy.launches import COUNTED, CPU_COUNTED, KERNELS_OF_TICK
from flexbatch.policy.limits import CODED_PASS_TOKENS, CODED_TOKENS
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import public_shape


def free_launch(name: str) -> Hardware:
    """Without what hand-computed passes leave out: launch cost and the slowing of shared memories and links."""
    hardware = load_hardware(name)
    rate = hardware.cpu_attention.values[0]
    alone = dataclasses.replace(hardware, cpu_attention_during_h2d=rate, h2d_during_cpu_attention=hardware.h2d)
    fixed = (
        "launch_seconds",
        "graph_seconds",
        "pass_seconds",
        "sequence_seconds",
        "away_sequence_seconds",
        "cpu_attention_seconds",
        "exchange_seconds",
        "synchronize_seconds",
        "staging_seconds",
        "expand_seconds",
        "expand_start_seconds",
        "request_seconds",
        "fetch_seconds",
        "link_seconds",
        "disk_read_seconds",
    )
    free = dataclasses.replace(alone, **dict.fromkeys(fixed, 0.0), link_both=1e15, host_bandwidth=1e15)
    return dataclasses.replace(free, prompt_token_seconds=1e-18)  # 0: by its share in a pass


def small(**changes) -> Hardware:
    return dataclasses.replace(free_launch("h200"), **changes)


TINY = ModelShape.from_sizes("tiny", 4, 64, 4, 256, 1000)


def test_weight_streaming_by_hand():
    policy = Policy(Split(0, 1), Split(1, 0), Split(1, 0), 1, 2)
    model = PassModel(TINY, small(h2d=1e6), policy, PassLoad.decode(2, 10))
    weights = 2 * (4 * 12 * 64 * 64 + 1000 * 64)
    seconds = model.resource_seconds(point_of(policy))
    assert seconds["h2d"] == max(seconds.values()) == pytest.approx((weights + 2 * 64 * 2) / 1e6)
    # The link is the busiest resource of every stage, so the pass takes what the link needs.
    assert float(model.pass_seconds(point_of(policy))) == pytest.approx((weights + 2 * 64 * 2) / 1e6)


def test_weights_on_disk_cross_both_the_disk_and_the_link():
    policy = Policy(Split(0, 0.25, 0.75), Split(1, 0), Split(1, 0), 1, 2)
    work = PassModel(TINY, small(), policy, PassLoad.decode(2, 10)).resource_work(point_of(policy))
    weights = 2 * (4 * 12 * 64 * 64 + 1000 * 64)
    assert work["disk_read"] == pytest.approx(0.75 * weights)
    assert work["h2d"] == pytest.approx(weights + 2 * 64 * 2)


def test_a_disk_reads_and_writes_in_turn():
    policy = Policy(Split(1, 0), Split(0, 0, 1), Split(1, 0), 2, 2)
    seconds = PassModel(TINY, small(), policy, PassLoad.decode(4, 100) + PassLoad.prefill(4, 50)).resource_seconds(
        point_of(policy)
    )
    assert min(seconds["disk_read"], seconds["disk_write"]) > 0
    assert seconds["disk_read + disk_write"] == pytest.approx(seconds["disk_read"] + seconds["disk_write"])


def test_cache_traffic_by_hand():
    policy = Policy(Split(1, 0), Split(0, 0.5, 0.5), Split(1, 0), 2, 2, cpu_attention=1.0)
    work = PassModel(TINY, small(), policy, PassLoad.decode(4, 100)).resource_work(point_of(policy))
    row = 2 * 64 * 2
    queries = 2 * 64 * 2
    assert work["disk_read"] == pytest.approx(4 * 2 * (100 + 7.5) * row)
    assert work["cpu_attention"] == pytest.approx(4 * 2 * 100 * row)
    assert work["h2d"] == pytest.approx(work["disk_read"] + 4 * queries)
    assert work["d2h"] == pytest.approx(4 * (4 * row + queries))
    assert work["disk_write"] == pytest.approx(4 * 2 * row)


def test_no_overlap_costs_the_sum():
    policy = Policy(Split(0, 1), Split(0, 1), Split(1, 0), 8, 2)
    load = PassLoad.decode(16, 500)
    model = PassModel(public_shape("opt-6.7b"), small(), policy, load)
    serial = PassModel(public_shape("opt-6.7b"), small(), dataclasses.replace(policy, overlap=False), load)
    seconds = model.resource_seconds(point_of(policy))
    in_turn = sum(seconds[n] for n in ("h2d", "d2h", "gpu_compute"))
    assert float(serial.pass_seconds(point_of(policy))) == pytest.approx(in_turn)
    settled = PassModel(
        public_shape("opt-6.7b"), small(synchronize_seconds=1e-3), dataclasses.replace(policy, overlap=False), load
    )
    assert float(settled.pass_seconds(point_of(policy))) == pytest.approx(in_turn + 33 * 2 * 1e-3)


def test_launch_cost_counts_every_tick():
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 8, 3, async_scheduling=False)
    ahead = dataclasses.replace(policy, async_scheduling=True)
    load, shape = PassLoad.decode(24, 500), public_shape("opt-6.7b")
    base = float(PassModel(shape, small(), policy, load).pass_seconds(point_of(policy)))
    for each in (1e-9, 1e-5, 1e-3, 1.0):
        host = small(launch_seconds=each, pass_seconds=0.5)
        ticks = 33 * 3 * each
        expected = 0.5 + max(base, ticks) + IN_VIEW * min(base, ticks)
        assert float(PassModel(shape, host, policy, load).pass_seconds(point_of(policy))) == pytest.approx(expected)
        hidden = max(base, 0.5 + ticks) + STREAMED_IN_VIEW * min(base, 0.5 + ticks)
        assert float(PassModel(shape, host, ahead, load).pass_seconds(point_of(ahead))) == pytest.approx(hidden)


@pytest.mark.parametrize(
    ("hidden", "changes"),
    [
        (True, {}),
        (False, {"async_scheduling": False}),
        (False, {"overlap": False}),
        (False, {"weights": Split(0.9, 0.1)}),
        (False, {"cache": Split(0.9, 0.1)}),
        (False, {"activations": Split(0, 1)}),
    ],
)
@pytest.mark.parametrize(
    "others", [{}, {"device": "cpu"}, {"tensor_ranks": 2, "tell_seconds": 1e-6}], ids=["one gpu", "cpu", "two gpus"]
)
def test_composing_is_hidden_where_a_pass_lies_on_one_gpu(hidden, changes, others):
    """As `execution.pipelined.passes_of` runs them."""
    whole = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 8, 2)
    policy, load, shape = dataclasses.replace(whole, **changes), PassLoad.prefill(16, 200), public_shape("opt-6.7b")
    busy, composed = (
        float(PassModel(shape, small(pass_seconds=each, **others), policy, load).pass_seconds(point_of(policy)))
        for each in (0.0, 1e-4)
    )
    assert composed - busy == pytest.approx(1e-4 * (STREAMED_IN_VIEW if hidden and not others else 1.0))


@pytest.mark.parametrize("weights", [Split(1, 0), Split(0, 1)], ids=["resident", "streamed"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_launching_is_hidden_where_the_host_waits_for_nothing(weights, overlap, device):
    """More where weights stream and the host waits for nothing; not at all without a GPU, where the same cores compute,
    and without overlap."""
    policy = Policy(weights, Split(1, 0), Split(1, 0), 8, 2, overlap=overlap, async_scheduling=False)
    load, shape = PassLoad.prefill(16, 200), public_shape("opt-6.7b")
    hardware = dataclasses.replace(small(), device=device)
    busy = float(PassModel(shape, hardware, policy, load).pass_seconds(point_of(policy)))
    counted = COUNTED if device == "cuda" else CPU_COUNTED
    ticks = 33 * 2 + (0 if weights.gpu else 32 * 2 * counted["fetch"] / KERNELS_OF_TICK)
    slow = dataclasses.replace(hardware, launch_seconds=busy / (2 * ticks))
    shown = float(PassModel(shape, slow, policy, load).pass_seconds(point_of(policy))) - busy
    share = 1.0 if device == "cpu" or not overlap else IN_VIEW if weights.gpu else STREAMED_IN_VIEW
    assert shown == pytest.approx(share * busy / 2)


def test_pages_are_gathered_when_the_gpu_has_nothing_to_compute():
    policy, shape = Policy(Split(1, 0), Split(0, 1), Split(1, 0), 16, 2), public_shape("llama-3.2-1b")
    load = PassLoad.decode(32, 400) + PassLoad.prefill(8, 512)
    rows = PassModel(shape, small(), policy, load).resource_seconds(point_of(policy))
    # Those of the first layer come before there is anything beside them.
    gathered = rows["h2d"] * (1 + 1 / shape.num_layers)
    assert rows["gather beside gpu_compute"] == pytest.approx(rows["gpu_compute"] + gathered)
    pass_seconds = PassModel(shape, small(), policy, load).pass_seconds(point_of(policy))
    assert float(pass_seconds) > 0.99 * (rows["gpu_compute"] + rows["h2d"])


@pytest.mark.parametrize(
    ("weights", "cache", "share", "load", "staged", "fetched"),
    [
        (Split(1, 0), Split(1, 0), 0.0, PassLoad.decode(16, 500), 0, 0),
        (Split(0.5, 0.5), Split(1, 0), 0.0, PassLoad.decode(16, 500), 0, 1),
        (Split(1, 0), Split(0, 1), 0.0, PassLoad.decode(16, 500), 1, 0),
        (Split(1, 0), Split(0, 1), 0.5, PassLoad.decode(16, 500), 1, 0),
        (Split(1, 0), Split(0, 1), 1.0, PassLoad.decode(16, 500), 0, 0),
        (Split(1, 0), Split(0.5, 0.5), 1.0, PassLoad.decode(16, 500), 0, 0),
        (Split(1, 0), Split(0.5, 0.5), 0.0, PassLoad.decode(16, 500), 2, 0),
        (Split(1, 0), Split(0, 1), 1.0, PassLoad.prefill(16, 500), 1, 0),
    ],
)
def test_what_is_staged_or_fetched_is_launched_too(weights, cache, share, load, staged, fetched):
    """With every tick; it matters where it takes longer than the busiest resource, and by a part where not. A cache on
    two tiers is attended in two calls."""
    shape, slow = public_shape("opt-6.7b"), small(staging_seconds=10.0, fetch_seconds=1e-2)
    one = Policy(weights, cache, Split(1, 0), 16, 1, cpu_attention=share)
    two = Policy(weights, cache, Split(1, 0), 8, 2, cpu_attention=share)
    each = staged * 10.0 + fetched * 1e-2
    for policy in (one, two, dataclasses.replace(two, overlap=False)):
        assert float(PassModel(shape, slow, policy, load).launched(point_of(policy))) == pytest.approx(
            32 * policy.num_gpu_batches * each
        )
    shown, none = (
        float(PassModel(shape, hardware, two, load).pass_seconds(point_of(two))) for hardware in (slow, small())
    )
    launched, share = 32 * 2 * each, WAITING_IN_VIEW if two.cpu_attention and cache.cpu else STREAMED_IN_VIEW
    share = IN_VIEW if weights.gpu == cache.gpu == 1 else share
    assert shown == pytest.approx(max(none, launched) + share * min(none, launched))


def test_quantized_rows_are_expanded_at_their_own_rate():
    eight, four = Curve((1.0, 4.0), (5e10, 3e10)), Curve((1.0, 4.0), (4e10, 2e10))
    hardware = dataclasses.replace(load_hardware("h200"), cpu_attention_8=eight, cpu_attention_4=four)
    assert hardware.cpu_attention_rate(1) == hardware.cpu_attention.values[0]
    assert [hardware.cpu_attention_rate(heads, cache_bits=8) for heads in (1, 4, 8)] == [5e10, 3e10, 1.5e10]
    assert hardware.cpu_attention_rate(4, cache_bits=4) == 2e10
    assert (
        dataclasses.replace(hardware, cpu_attention_8=None).cpu_attention_rate(1, cache_bits=8)
        == hardware.cpu_attention.values[0]
    )
    policy = Policy(Split(1, 0), Split(0, 1), Split(1, 0), 8, 2, cache_bits=8, cpu_attention=1.0)
    model = PassModel(
        public_shape("opt-6.7b"),
        dataclasses.replace(hardware, cpu_attention_seconds=0.0),
        policy,
        PassLoad.decode(16, 500),
    )
    seconds = model.resource_seconds(point_of(policy))["cpu_attention"]
    assert float(seconds) == pytest.approx(32 * 16 * (500 + KEYS_OF_SEQUENCE[8]) * 2 * 4096 * 2 / 5e10)


def test_half_of_a_last_tile_is_empty():
    """Of sequences that the GPU attends."""
    shape, load = public_shape("opt-6.7b"), PassLoad.decode(24, 500)
    exact, tiled = (dataclasses.replace(load_hardware("h200"), attention_tile_keys=keys) for keys in (0.0, 64.0))
    for bits, rate in ((16, exact.attention_decode), (4, exact.quantized_attention)):
        for attended, read in ((0.0, 24), (0.25, 18)):
            policy = Policy(Split(1, 0), Split(0, 1), Split(1, 0), 12, 2, cache_bits=bits, cpu_attention=attended)
            before, after = (
                float(PassModel(shape, hardware, policy, load).resource_seconds(point_of(policy))["gpu_compute"])
                for hardware in (exact, tiled)
            )
            assert after - before == pytest.approx(32 * read * 32 * 2 * 4096 * 2 / rate)


@pytest.mark.parametrize("batches", [1, 2])
def test_kernels_of_a_layer_begin_and_end_in_every_micro_batch(batches):
    """On a GPU, in graphs and out of them, the head's once more."""
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 24, batches)
    shape = public_shape("opt-6.7b")
    for load in (PassLoad.decode(24, 500), PassLoad.decode(24, 500) + PassLoad.prefill(1, 64)):
        base, found = (
            PassModel(shape, small(graph_seconds=each), policy, load).resource_seconds(point_of(policy))
            for each in (0.0, 2e-4)
        )
        assert float(found["gpu_compute"] - base["gpu_compute"]) == pytest.approx(batches * 33 * 2e-4)


def test_graphs_compute_what_fills_them_up():
    """Of 33 sequences a graph of 64 runs, of 33 tokens with a prompt pieces of 64: both take as long as 64. Launched
    one by one, or with a cache elsewhere, passes take what their tokens do."""
    shape, curve = public_shape("opt-6.7b"), Curve((1.0,), (1e12,))
    hardware = small(gemm=curve, attention_decode=1e18, attention_prefill=1e24, piece_seconds=1e-9)
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 64, 1, prefill_chunk=64, piece_tokens=512)

    def seconds(decoding: int, prompt: int, **changes: object) -> float:
        met = dataclasses.replace(policy, **changes)
        load = PassLoad(decoding, decoding, prompt, 0.0, prompt, prompt > 0)
        return float(PassModel(shape, hardware, met, load).resource_seconds(point_of(met))["gpu_compute"])

    layers = 2 * 32 * shape.block_elements / 1e12
    head = 2 * shape.head_elements / 1e12
    for sequences in (33, 64):
        assert seconds(sequences, 0) == pytest.approx(64 * (layers + head), rel=1e-3)
    for prompt in (32, 62):
        assert seconds(1, prompt) == pytest.approx(64 * layers + 2 * head, rel=1e-3)
    assert seconds(1, 600) > seconds(1, 599), "more than the largest pieces"
    for changes in ({"piece_tokens": 0}, {"num_gpu_batches": 2}, {"cache": Split(0, 1)}):
        assert seconds(1, 32, **changes) == pytest.approx(33 * layers, rel=0.05), changes
    assert seconds(33, 0, cache=Split(0, 1)) < 0.6 * seconds(33, 0)


def of_few(batches: int) -> int:
    """Tokens of the largest pass in so many micro-batches that is multiplied with codes."""
    return max(CODED_TOKENS * batches, CODED_PASS_TOKENS)


def test_ticks_of_experts_launch_what_routes_besides():
    """A streamed tick of Qwen3-30B-A3B took a busy H100's host 4.7 ms, where it took dense models' 1.8."""
    ticks = {}
    for name, routed in (("qwen3-30b-a3b", 48), ("glm-4.5-air", 45), ("opt-6.7b", 0)):
        shape = public_shape(name)
        for batches in (1, 11):
            policy = Policy(Split(0, 1), Split(0, 1), Split(1, 0), 80, batches, cpu_attention=1.0)
            model = PassModel(shape, small(launch_seconds=1.0), policy, PassLoad.decode(80, 100))
            ticks[name, batches] = float(model.tick_seconds) / batches - shape.num_layers - 1
        assert ticks[name, 1] == pytest.approx(routed * LAUNCHES_OF_EXPERTS / KERNELS_OF_TICK) == ticks[name, 11]


def test_quantized_products_are_launched_as_they_run():
    """Expansion once a layer, whatever the number of micro-batches; products of few tokens with codes in every tick,
    and neither at 16 bits. A profile that lacks them has them by their kernels."""
    shape, machine = public_shape("opt-6.7b"), small(expand_seconds=1.0, coded_seconds=0.25)
    for batches in (1, 4):
        for bits, few, many in ((16, 0.0, 0.0), (8, 0.25 * batches, 1.0), (4, 0.25 * batches, 1.0)):
            policy = Policy(Split(0, 1), Split(1, 0), Split(1, 0), 80, batches, weight_bits=bits)
            for sequences, each in ((CODED_TOKENS * batches, few), (of_few(batches) + 1, many)):
                load = PassLoad.decode(sequences, 100)
                assert float(PassModel(shape, machine, policy, load).tick_seconds) == 32 * each
    for device, counted in (("cuda", COUNTED), ("cpu", CPU_COUNTED)):
        lacking = small(launch_seconds=24.0, device=device)
        assert {what: lacking.launched_seconds(what) for what in counted} == pytest.approx(counted)


def test_a_few_tokens_are_multiplied_with_codes():
    """On a GPU: of a pass of so many tokens, or of such micro-batches, nothing is expanded, of one more all. Codes are
    read at a share of the memory bandwidth by each of two micro-batches, and tiles take their time full or not."""
    shape = public_shape("opt-6.7b")

    def seconds(hardware: Hardware, tokens: int, bits: int = 4) -> float:
        policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), tokens, 2, weight_bits=bits)
        model = PassModel(shape, hardware, policy, PassLoad.decode(2 * tokens, 100))
        return float(model.resource_seconds(point_of(policy))["gpu_compute"])

    fast, slow = small(expand=1e18), small(expand=1e12)
    expansion = 32 * (shape.block_bytes(4) + shape.block_bytes(16)) / 1e12
    most = of_few(2) // 2
    assert seconds(slow, most) == pytest.approx(seconds(fast, most))
    assert seconds(slow, most + 1) - seconds(fast, most + 1) == pytest.approx(expansion, rel=1e-3)
    narrow, wide = (dataclasses.replace(fast, gpu_bandwidth=rate) for rate in (1e9, 1e18))
    stored = shape.weight_bytes(shape.block_elements, 4)
    for tokens, share in ((8, 0.64), (16, 0.58), (17, 0.58), (64, 0.58), (most, 0.58)):
        reading = seconds(narrow, tokens) - seconds(wide, tokens)
        reading -= seconds(narrow, tokens, 16) - seconds(wide, tokens, 16)
        assert reading == pytest.approx(32 * 2 * stored / (share * 1e9), rel=0.02), tokens
    some = (8, 9, 16, 17, 32, 33, 64, 256, 257, 512)
    of_tokens = {tokens: float(coded_seconds(wide, 4, 1e8, 1.0, np.asarray(tokens))) for tokens in some}
    assert of_tokens[8] < of_tokens[9] == of_tokens[16] < of_tokens[17] == of_tokens[32]
    assert of_tokens[32] < of_tokens[33] == of_tokens[64] < of_tokens[256] < of_tokens[257] == of_tokens[512]
    fast, slow = (dataclasses.replace(hardware, device="cpu") for hardware in (fast, slow))
    assert seconds(slow, 64) - seconds(fast, 64) == pytest.approx(expansion, rel=1e-3)


def test_tiles_of_codes_are_those_of_the_kernel():
    pytest.importorskip("triton")
    from flexbatch.kernels import coded_gemm, coded_linear

    few, all_tokens = coded_linear.MOST_TOKENS, range(1, CODED_TILES[-1] + 1)
    found = [(coded_linear if tokens <= few else coded_gemm).choose_launch(tokens).tokens for tokens in all_tokens]
    assert found == [next(tile for tile in CODED_TILES if tile >= tokens) for tokens in all_tokens]
    assert coded_gemm.choose_launch(4096).tokens == CODED_TILES[-1]


def test_products_with_codes_cost_what_was_measured():
    """On a processor with such curves: no expansion, their rates, and the bytes of the codes; the head as before."""
    shape, curve = public_shape("opt-6.7b"), Curve((1.0, 64.0), (2e10, 4e10))
    plain = dataclasses.replace(small(expand=1e9), device="cpu")
    measured = dataclasses.replace(plain, coded_4=curve, gemm=Curve((1.0,), (1e15,)), gpu_bandwidth=1e15)

    def seconds(hardware: Hardware, bits: int, tokens: int = 64) -> dict[str, float]:
        policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), tokens, 2, weight_bits=bits)
        model = PassModel(shape, hardware, policy, PassLoad.decode(2 * tokens, 1))
        return {name: float(value) for name, value in model.resource_seconds(point_of(policy)).items()}

    products = 2 * 32 * shape.block_elements  # of a token of each of the two micro-batches
    for tokens, rate in ((64, 4e10), (1, 2e10), (128, 4e10)):
        took = seconds(measured, 4, tokens)["gpu_compute"] - seconds(measured, 16, tokens)["gpu_compute"]
        assert took == pytest.approx(2 * tokens * products / rate, rel=0.01)
    assert seconds(measured, 8)["gpu_compute"] > 32 * shape.block_bytes(16) / 1e9, "8 bits were not measured"
    slow = dataclasses.replace(measured, gpu_bandwidth=1e9)
    saved = seconds(slow, 16)["gpu_memory"] - seconds(slow, 4)["gpu_memory"]
    assert saved == pytest.approx(2 * 32 * (shape.block_bytes(16) - shape.block_bytes(4)) / 1e9, rel=0.01)


def test_a_sequence_costs_the_host_once_more_when_its_prompt_is_read():
    policy = Policy(Split(0, 1), Split(1, 0), Split(1, 0), 8, 3)
    shape = public_shape("opt-6.7b")
    for load, finished in ((PassLoad.decode(8, 100), 0), (PassLoad.prefill(5, 64), 5)):
        host = PassModel(shape, small(request_seconds=0.5), policy, load).host_seconds
        assert float(host) == pytest.approx(0.5 * finished, abs=1e-12)


def test_every_token_of_a_prompt_costs_the_host():
    """Of those that a pass reads, whether or not it completes them."""
    policy = Policy(Split(0, 1), Split(1, 0), Split(1, 0), 8, 3)
    shape = public_shape("opt-6.7b")
    for load, tokens in ((PassLoad.decode(8, 100), 0), (PassLoad.prefill(5, 64, 64, finished=False), 320)):
        host = PassModel(shape, small(prompt_token_seconds=0.25), policy, load).host_seconds
        assert float(host) == pytest.approx(0.25 * tokens)
        before = PassModel(shape, small(pass_seconds=2.0, prompt_token_seconds=0.0), policy, load).host_seconds
        assert float(before) == pytest.approx(2.0 * (1 + PROMPT_TOKEN_SHARE * tokens)), "by its share"


def test_every_sequence_costs_the_host():
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 8, 3, async_scheduling=False)
    load, shape = PassLoad.decode(24, 500) + PassLoad.prefill(2, 100), public_shape("opt-6.7b")
    base = float(PassModel(shape, small(), policy, load).pass_seconds(point_of(policy)))
    assert float(
        PassModel(shape, small(sequence_seconds=1e-4), policy, load).pass_seconds(point_of(policy))
    ) == pytest.approx(base + 26e-4)


def test_sequences_whose_cache_is_elsewhere_cost_the_host_more():
    """By the share of the cache, on top of what everything else takes, and those that read prompts not."""
    load, shape = PassLoad.decode(24, 500) + PassLoad.prefill(2, 100), public_shape("opt-6.7b")
    for cache in (Split(1, 0), Split(0.25, 0.75), Split(0, 0.5, 0.5)):
        policy = Policy(Split(0, 1), cache, Split(1, 0), 8, 3)
        base, found = (
            float(PassModel(shape, small(away_sequence_seconds=each), policy, load).pass_seconds(point_of(policy)))
            for each in (0.0, 1e-3)
        )
        assert found - base == pytest.approx(24e-3 * (1 - cache.gpu))


def test_fixed_costs_of_cpu_attention_and_of_disk_pages():
    """By calls and requests of the layers; a pass of prompts alone has none, and the head neither."""
    shape, load = public_shape("opt-6.7b"), PassLoad.decode(24, 500)
    two = Policy(Split(1, 0), Split(0, 0.5, 0.5), Split(1, 0), 12, 2, cpu_attention=1.0)
    one = dataclasses.replace(two, gpu_batch_size=24, num_gpu_batches=1)
    slow = small(cpu_attention_seconds=1.0, exchange_seconds=10.0, disk_read_seconds=100.0)
    for policy in (one, two):
        point, calls = point_of(policy), 32 * policy.num_gpu_batches * 0.5
        base, costly = (
            PassModel(shape, hardware, policy, load).resource_seconds(point) for hardware in (small(), slow)
        )
        # As many with a few sequences attended as with all.
        assert costly["cpu_attention"] - base["cpu_attention"] == pytest.approx(2 * calls)
        assert costly["disk_read"] - base["disk_read"] == pytest.approx(100 * (calls + 32 * 24 / 4 * 0.5))
        if policy is one:
            assert costly["CPU attention in turn"] - base["CPU attention in turn"] == pytest.approx(22 * calls)
        staged = PassModel(shape, slow, dataclasses.replace(policy, cpu_attention=0.0), load).resource_seconds(point)
        assert staged["cpu_attention"] == base["cpu_attention"]
        prompts = PassModel(shape, slow, policy, PassLoad.prefill(24, 100)).resource_seconds(point)
        assert prompts["cpu_attention"] == 0 and prompts["disk_read"] < 1


def test_one_micro_batch_cannot_hide_cpu_attention():
    shape = public_shape("opt-30b")
    one = Policy(Split(1, 0), Split(0, 1), Split(1, 0), 32, 1, cpu_attention=1.0)
    two = dataclasses.replace(one, gpu_batch_size=16, num_gpu_batches=2)
    load = PassLoad.decode(32, 500) + PassLoad.prefill(32, 128)
    seconds = {p: PassModel(shape, small(), p, load).resource_seconds(point_of(p)) for p in (one, two)}
    for policy, share in ((one, 1), (two, 1 / 2)):
        both = seconds[policy]["cpu_attention"] + seconds[policy]["gpu_compute"]
        assert seconds[policy]["CPU attention in turn"] == pytest.approx(share * both)
    three = PassModel(shape, small(), dataclasses.replace(two, num_gpu_batches=3), PassLoad.decode(32, 500))
    alone = three.resource_seconds(point_of(three.policy))
    both = alone["cpu_attention"] + alone["gpu_compute"]
    assert alone["CPU attention in turn"] == pytest.approx(both / 3), "without prompts two ticks are put off"
    none = dataclasses.replace(two, cpu_attention=0.0)
    assert "CPU attention in turn" not in PassModel(shape, small(), none, load).resource_seconds(point_of(none))


@pytest.mark.parametrize(("bits", "keys"), [(16, 16), (8, 24), (4, 24)])
def test_a_sequence_takes_the_cpu_as_long_as_some_keys(bits, keys):
    """Beside its own, so that many short ones take longer than a few long ones of as many keys."""
    shape, policy = public_shape("opt-30b"), Policy(Split(1, 0), Split(0, 1), Split(1, 0), 64, 2, cpu_attention=1.0)
    policy = dataclasses.replace(policy, cache_bits=bits)

    def seconds(sequences: int, context: int) -> float:
        model = PassModel(shape, small(), policy, PassLoad.decode(sequences, context))
        return float(model.resource_seconds(point_of(policy))["cpu_attention"])

    each = (seconds(8, 2000) - seconds(8, 1000)) / 8000
    assert seconds(80, 100) - seconds(8, 1000) == pytest.approx(72 * keys * each)
    bytes_attended = PassModel(shape, small(), policy, PassLoad.decode(80, 100)).resource_work(point_of(policy))
    assert bytes_attended["cpu_attention"] == pytest.approx(48 * 8000 * shape.token_bytes(bits)), (
        "none of them are read"
    )


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("weights", [Split(1, 0), Split(0.25, 0.5, 0.25)])
def test_one_micro_batch_launches_nothing_beside_cpu_attention(bits, weights):
    """Of passes in which sequences decode, and where some of it is attended there."""
    shape, host = public_shape("opt-30b"), small(launch_seconds=1.0)
    policy = Policy(weights, Split(0, 1), Split(1, 0), 32, 1, cpu_attention=0.5, weight_bits=bits)
    tick = (
        1.0
        + (0.0 if bits == 16 else host.launched_seconds("coded"))
        + (1 - weights.gpu) * host.launched_seconds("fetch")
    )

    def in_turn(policy: Policy, load: PassLoad) -> float:
        hardware = (small(), host)
        models = (PassModel(shape, each, policy, load) for each in hardware)
        none, launched = (each.resource_seconds(point_of(policy))["CPU attention in turn"] for each in models)
        return float(launched - none)

    assert in_turn(policy, PassLoad.decode(32, 500)) == pytest.approx(48 * tick)
    assert in_turn(policy, PassLoad.prefill(32, 128)) == 0
    assert in_turn(dataclasses.replace(policy, cpu_attention=0.0), PassLoad.decode(32, 500)) == 0


def test_contention_meets_the_measured_pair():
    """At the measured pair of rates both rows take exactly the measured time."""
    hardware = load_hardware("h200")
    attended, link = hardware.cpu_attention_during_h2d, hardware.h2d_during_cpu_attention
    assert link / hardware.h2d + attended * hardware.link_slowdown / hardware.h2d == pytest.approx(1.0)
    rate = hardware.cpu_attention.values[0]
    assert attended / rate + link * hardware.cpu_attention_slowdown / rate == pytest.approx(1.0)


def test_arrays_of_passes_give_what_single_passes_give():
    shape, hardware = public_shape("opt-30b"), load_hardware("h200")
    policy = Policy(Split(0.2, 0.8), Split(0, 1), Split(1, 0), 24, 4, cpu_attention=0.3)
    loads = [PassLoad.decode(96, c) + PassLoad.prefill(t, 512) for c, t in ((512, 0), (600, 1), (700, 30))]
    stacked = PassLoad(*(np.array([getattr(x, f.name) for x in loads]) for f in dataclasses.fields(PassLoad)))
    point = point_of(policy)
    together = PassModel(shape, hardware, policy, stacked).pass_seconds(point)
    assert together == pytest.approx([float(PassModel(shape, hardware, policy, x).pass_seconds(point)) for x in loads])


def test_gemm_seconds_never_fall_with_tokens():
    hardware = load_hardware("h200")
    tokens = np.arange(1, 5000)
    seconds = hardware.gemm_seconds(10**9, tokens)
    assert np.all(np.diff(seconds) >= -1e-15)
    assert hardware.gemm_seconds(10**9, 0) == 0
    for tokens, rate in zip(hardware.gemm.points, hardware.gemm.values, strict=True):
        assert hardware.gemm_seconds(10**9, tokens) == pytest.approx(2e9 * tokens / rate)
    assert hardware.gemm_seconds(10**9, 8192) == pytest.approx(2 * 8192e9 / hardware.gemm.values[-1])
