"""A plan in words, and the memory that its tables show."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.policy.card_names import shipped_name, shipped_names
from flexbatch.policy.cost import JOINT, RESOURCES
from flexbatch.policy.explain import explain, summary
from flexbatch.policy.footprint import memory_rows, peak_memory, round_cache, spread_weights
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.plan import Plan, price
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import SHAPES, find_shape, public_shape
from flexbatch.policy.units import duration_text, number_text
from flexbatch.policy.workload import Workload

ON_GPU, ON_CPU = Split(1, 0), Split(0, 1)


def priced(model: str = "opt-30b", machine: str = "h200", sequences: int | None = 300, **settings) -> Plan:
    policy = {"weights": Split(0.2, 0.8), "cache": ON_CPU, "activations": ON_GPU, "gpu_batch_size": 48}
    policy |= {"num_gpu_batches": 3, "cpu_attention": 1.0, **settings}
    return price(public_shape(model), load_hardware(machine), Workload.uniform(512, 32, sequences), Policy(**policy))


def test_words_come_first_and_say_what_matters():
    text = explain(priced())
    head, tables = text.split("\n\npolicy: ")
    for words in (
        "DOES NOT FIT",
        "missing",
        "new tokens/s",
        "this job",
        "first answer",
        "writes nothing",
        "limited by",
    ):
        assert words in head
    for words in ("weights", "free", "budget", "average pass", "h2d", "cpu_attention", "bound of this policy"):
        assert words in tables
    assert "It fits: 300 prompts of 512 tokens, 32 new tokens each." in explain(priced("opt-6.7b", gpu_batch_size=8))


def test_waves_and_tail_are_told():
    """A last wave of 10, and the lengths that it stands for."""
    text = explain(priced(sequences=138, gpu_batch_size=64, num_gpu_batches=1))
    assert "3 waves of up to 64 sequences; assumed are prompts of 512 tokens and answers of 32.0 on average" in text
    assert re.search(r"tail +the last \d+ passes run 1\d\.?\d* of 64 sequences and take .+, \d+% of the job", text)
    assert "none: the block is full until the end" in explain(priced(sequences=1, gpu_batch_size=1, num_gpu_batches=1))


def test_no_number_is_a_power_of_ten_or_all_zeros():
    for model, machine, sequences in (
        ("llama-3.1-405b", "t4", 10**6),
        ("opt-125m", "h200", 3),
        ("opt-30b", "l4", None),
    ):
        text = explain(priced(model, machine, sequences))
        assert not re.search(r"\d[eE][+-]?\d", text), text
        assert "0.000 " not in text and " 0 s" not in text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.00023, "0.23 ms"),
        (0.0123, "12.3 ms"),
        (0.9996, "1000 ms"),
        (5.04, "5.04 s"),
        (59.96, "1 min"),
        (250, "4 min 10 s"),
        (3599.6, "1 h"),
        (21240, "5 h 54 min"),
        (569100.0, "6.6 days"),
        (3200000000.0, "37,037.0 days"),
    ],
)
def test_durations_are_told_as_people_tell_them(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    "value, text", [(0.00432, "0.0043"), (1.017, "1.02"), (18.24, "18.2"), (12345.6, "12,346"), (0, "0")]
)
def test_rates_have_three_digits_that_count(value, text):
    assert number_text(value) == text


@settings(deadline=None, max_examples=150)
@given(
    model=st.sampled_from(["opt-125m", "opt-1.3b", "llama-3-8b", "opt-30b", "falcon-7b"]),
    machine=st.sampled_from(["h200", "cpu", "t4", "rtx-4090"]),
    weights=st.sampled_from([ON_GPU, ON_CPU, Split(0, 0, 1), Split(0.5, 0.3, 0.2)]),
    cache=st.sampled_from([ON_GPU, ON_CPU, Split(0, 0, 1), Split(0.2, 0.5, 0.3)]),
    batch=st.sampled_from([1, 7, 64, 512]),
    count=st.integers(1, 4),
    overlap=st.booleans(),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    bits=st.sampled_from([16, 8, 4]),
    sequences=st.sampled_from([None, 3, 700]),
)
def test_what_limits_is_busy(model, machine, weights, cache, batch, count, overlap, share, bits, sequences):
    """It was the first name of a row in which two resources slow each other, or take turns, whichever of them was
    busy; and launching beside other resources counted for nothing."""
    plan = priced(
        model, machine, sequences, weights=weights, cache=cache, gpu_batch_size=batch, num_gpu_batches=count,
        overlap=overlap, cpu_attention=share, weight_bits=bits, cache_bits=bits,
    )  # fmt: skip
    limit, busy = plan.limiting_resource, plan.resource_seconds
    assert plan.limiting_seconds >= 0.15 * plan.pass_seconds, (limit, plan.limiting_row, plan.row_seconds)
    told = re.search(r"limited by .* (\d+)% of the time", explain(plan))
    assert told is not None and int(told[1]) >= 15
    if plan.limiting_row in RESOURCES:
        assert plan.limiting_seconds == max(busy.values())
    assert limit in (*JOINT.get(plan.limiting_row, (plan.limiting_row,)), "launch")


def test_first_answer_is_the_end_of_the_first_sequence():
    one = priced(sequences=1, gpu_batch_size=1, num_gpu_batches=1)
    assert one.first_answer_seconds == pytest.approx(one.seconds)
    many = priced(sequences=1000)
    assert 0 < many.first_answer_seconds < many.seconds / 2
    assert priced(sequences=None).first_answer_seconds is None


def test_what_the_disk_is_written():
    plan = priced(weights=Split(0, 0.5, 0.5), cache=Split(0, 0, 1), cpu_attention=0.0)
    written = plan.disk_write_bytes
    assert written["weights"] == plan.memory["disk"]["weights"] > 0
    rows = 300 * (512 + 31) * plan.shape.token_bytes(16) * plan.shape.num_layers
    assert written["cache and activations"] == pytest.approx(rows, rel=0.01)
    assert "of weights once and" in explain(plan) and "during the job" in explain(plan)


def test_small_models_are_told_in_small_units():
    text = explain(priced("opt-125m", "cpu", 3, gpu_batch_size=2, num_gpu_batches=1, weights=ON_GPU, cache=ON_GPU))
    assert "peak memory, MiB" in text and " GFLOP" in text and "0.000 GiB" not in text


def test_other_plans_stand_beside_the_plan():
    plan = priced()
    faster = dataclasses.replace(plan, predicted_tokens_per_second=1.5 * plan.predicted_tokens_per_second)
    assert "8-bit cache" in explain(plan, smaller_caches={8: faster}) and "(+50%)" in explain(
        plan, smaller_caches={8: faster}
    )
    assert "no faster" in explain(plan, smaller_caches={8: plan})
    gains = dataclasses.replace(
        plan, tokens_per_second_per_gib={"gpu": 0.1 * plan.predicted_tokens_per_second, "cpu": 0.0}
    )
    line = next(line for line in explain(gains).splitlines() if "1 GiB more" in line)
    assert "gpu tier" in line and "+10.0%" in line and "cpu" not in line


def test_json_has_the_promised_names():
    data = json.loads(json.dumps(summary(priced())))
    assert data["predicted_tokens_per_second"] <= data["bound_tokens_per_second"]
    assert data["limiting_resource"] in data["resource_seconds"] or data["limiting_resource"] == "launch"
    assert sum(data["splits_percent"]["weights"].values()) == pytest.approx(100)
    weights = sum(data["bytes"]["weights"].values())
    assert weights == pytest.approx(2 * public_shape("opt-30b").total_elements, rel=0.01)
    assert data["fits"] is False and min(data["free_bytes"].values()) < 0 and data["hardware_origin"] == "measured"


@pytest.mark.parametrize(
    "name, shipped",
    [("RTX 4090", "rtx-4090"), ("NVIDIA GeForce RTX 3090", "rtx-3090"), ("5090", "rtx-5090"), ("rtx_4090", "rtx-4090")]
    + [("NVIDIA A100-SXM4-80GB", "a100"), ("A100 40GB", "a100-40gb"), ("Tesla T4", "t4"), ("NVIDIA L4", "l4")]
    + [("NVIDIA H100 80GB HBM3", "h100"), ("H200", "h200"), ("CPU", "cpu")]
    + [(name, None) for name in ("RTX 4090 Laptop GPU", "RTX 3090 Ti", "H100 PCIe", "A10", "GPU", "", "./t4", "T40")],
)
def test_cards_are_known_by_what_people_call_them(name, shipped):
    """And no other card is taken for one of them."""
    assert shipped_name(name) == shipped


def test_every_machine_says_whether_it_was_measured():
    origins = {name: load_hardware(name).origin for name in shipped_names()}
    assert {name for name, origin in origins.items() if origin == "measured"} == {"cpu", "h200"}
    assert {"t4", "l4", "rtx-3090", "rtx-4090", "rtx-5090", "a100", "h100"} <= origins.keys()
    assert "derived from published figures" in explain(priced(machine="rtx-4090"))
    assert "derived" not in explain(priced())


def test_derived_machines_are_what_their_script_derives():
    from benchmark.derive_profiles import profiles
    from flexbatch.policy.card_names import SHIPPED

    for name, text in profiles().items():
        assert (SHIPPED / name).read_text() == text, f"{name}: python -m benchmark.derive_profiles"


def test_derived_rates_keep_below_what_is_published():
    from benchmark.derive_profiles import LINK_BYTES, MACHINES

    for name, (card, host) in MACHINES.items():
        machine = load_hardware(name)
        assert machine.gpu_bandwidth < card.bandwidth * 1e9 and max(machine.gemm.values) < card.matrix * 1e12
        assert machine.h2d < LINK_BYTES[card.link] and machine.host_bandwidth < host.bandwidth * 1e9
        assert list(machine.gemm.values) == sorted(machine.gemm.values)
        assert machine.cpu_attention_during_h2d + machine.h2d_during_cpu_attention < 1.05 * machine.host_bandwidth


@pytest.mark.parametrize(
    "name, shape",
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("facebook/opt-30b", "opt-30b"),
        ("OPT-30B", "opt-30b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistral-7b"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", None),
        ("mistralai/Mistral-7B-v0.3", None),
        ("llama-3-8b-262k", None),
    ],
)
def test_variants_of_a_shape_are_that_shape(name, shape):
    """And what may have other sizes is not."""
    assert find_shape(name) == shape


@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes_are_those_of_the_family_readers(name):
    from flexbatch.models.shapes import shape
    from flexbatch.planner.problem import model_shape

    plain, exact = public_shape(name), model_shape(name, shape(name), 2)
    assert plain.total_elements == pytest.approx(exact.total_elements, rel=1e-3)
    for field in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "mlp_matrices", "vocab_size"):
        assert getattr(plain, field) == getattr(exact, field), field


@pytest.mark.parametrize(
    "name, billions",
    [
        ("opt-30b", 30.0),
        ("opt-175b", 174.6),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.6),
        ("llama-3.2-1b", 1.236),
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-14b", 14.77),
        ("qwen2.5-32b", 32.76),
        ("qwen2.5-72b", 72.7),
        ("qwen3-8b", 8.19),
        ("qwen3-14b", 14.77),
        ("qwen3-32b", 32.76),
        ("llama-3.1-405b", 405.85),
    ],
)
def test_public_shapes_have_their_size(name, billions):
    assert public_shape(name).total_elements == pytest.approx(billions * 1e9, rel=0.005)


def test_shape_comes_back_from_json():
    shape = public_shape("llama-3-8b")
    assert ModelShape.from_dict(json.loads(json.dumps(shape.as_dict()))) == shape


@settings(deadline=None, max_examples=60)
@given(gpu=st.floats(0, 1), rest=st.floats(0, 1), name=st.sampled_from(["opt-1.3b", "opt-30b", "llama-3-70b"]))
def test_spread_weights_meet_the_split_to_one_tensor(gpu, rest, name):
    shape = public_shape(name)
    asked = Split(gpu, (1 - gpu) * rest, 1 - gpu - (1 - gpu) * rest)
    realized, largest, _ = spread_weights(shape, asked)
    tensor = max(*shape.block_tensors, *shape.head_tensors, *shape.embedding_tensors) / shape.total_elements
    for want, have in zip(asked.fractions, realized.fractions, strict=True):
        assert abs(want - have) <= tensor + 1e-9
        assert want > 0 or have == 0
    assert largest <= shape.largest_layer_bytes(16)


def test_cache_split_is_whole_sequences():
    one = Split(1, 0)
    policy = Policy(one, Split(0.33, 0.5, 0.17), one, 5, 2)
    assert round_cache(policy).fractions == pytest.approx((0.3, 0.5, 0.2))
    assert round_cache(Policy(one, Split(0.33, 0.67), one, 5, 2)).fractions == pytest.approx((0.3, 0.7, 0))


def test_peak_memory_by_hand():
    """OPT-30B, FlexGen's policy: every number from the sizes alone."""
    shape, hardware = public_shape("opt-30b"), load_hardware("h200")
    policy = Policy(Split(0, 1), Split(0, 1), Split(1, 0), 48, 3, cpu_attention=0.5)
    peak = peak_memory(shape, hardware, Workload.uniform(512, 32), policy)
    row = 2 * 2 * 7168
    assert peak["cpu"]["cache"] == 144 * 544 * 48 * row
    assert peak["cpu"]["weights"] == 2 * shape.total_elements
    # A third slab, because CPU attention puts the second half of a layer's last tick off.
    assert peak["gpu"]["weight slabs"] == 3 * 2 * 12 * 7168 * 7168
    assert peak["gpu"]["cache staging"] == 2 * 48 * 544 * row
    # 64 rows, also of scored prompts, sampled from all at a time: there are fewer than 2**23 logits.
    assert peak["gpu"]["logits"] == (4 + 40) * 64 * 50272
    assert peak["gpu"]["activations"] == 3 * (48 + 48 * 512) * 7168 * 2


def test_quantized_peak_counts_the_expansion():
    shape, hardware = public_shape("opt-30b"), load_hardware("h200")
    policy = Policy(Split(0.5, 0.5), Split(1, 0), Split(1, 0), 4, 1, 4, 4)
    rows = memory_rows(shape, hardware, Workload.uniform(512, 32), policy)
    assert rows["gpu"]["weight slabs"][0] == 2 * 12 * 7168 * 7168
    assert shape.token_bytes(4) == 2 * 56 * (64 + 2 * 4)
