"""The command: tables, JSON, sweep, plots and exit codes; and the memory that the tables show."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.policy.__main__ import main
from flexbatch.policy.footprint import memory_rows, peak_memory, round_cache, spread_weights
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import names, public_shape
from flexbatch.policy.workload import Workload

ARGUMENTS = ["--hardware", "h200", "--model-shape", "opt-6.7b", "--gpu-memory", "16GiB", "--gpu-batch-size", "64"]


def test_text_names_what_matters(capsys):
    assert main(ARGUMENTS) == 0
    text = capsys.readouterr().out
    for words in ("weights", "free", "budget", "limited by", "of bound", "1 GiB more on", "h2d", "cpu_attention"):
        assert words in text


def test_a_resource_that_is_slowed_by_another_is_told_with_the_time_of_both(capsys):
    """It limits, though the resources, each alone, all have time left."""
    percent = ["--percent", "20", "80", "0", "100", "100", "0", "--cpu-attention", "1"]
    assert main([*ARGUMENTS[:2], "--model-shape", "opt-30b", "--gpu-memory", "16GiB", *percent]) == 0
    lines = capsys.readouterr().out.splitlines()
    busy = {line[:28].strip(): float(line.split()[-1].rstrip("%")) for line in lines if line.endswith("%")}
    limit = re.match(r"limited by (\w+) \((.*)\);", next(line for line in lines if line.startswith("limited by")))
    assert limit is not None and "beside" in limit[2]
    assert busy[limit[2]] == max(busy.values()) > busy[limit[1]]


def test_small_models_are_told_in_small_units(capsys):
    words = ["--gpu-batch-size", "2", "--num-gpu-batches", "1", "--prompt-len", "8", "--gen-len", "4"]
    assert main(["--hardware", "cpu", "--model-shape", "opt-125m", *words]) == 0
    text = capsys.readouterr().out
    assert "peak memory, MiB" in text and " GFLOP" in text and "0.000 GiB" not in text


def test_json_has_the_promised_names(capsys):
    assert main([*ARGUMENTS, "--json", "--num-sequences", "300"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["predicted_tokens_per_second"] <= data["bound_tokens_per_second"]
    assert data["limiting_resource"] in data["resource_seconds"] or data["limiting_resource"] == "launch"
    assert sum(data["splits_percent"]["weights"].values()) == pytest.approx(100)
    assert data["bytes"]["weights"]["gpu"] + data["bytes"]["weights"]["cpu"] == pytest.approx(
        2 * public_shape("opt-6.7b").total_elements, rel=0.01
    )
    assert all(size >= 0 for size in data["free_bytes"].values())


def test_sweep_grows_with_memory_and_is_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert (
        main(
            [
                *ARGUMENTS[:4],
                "--sweep",
                "gpu_memory=2GiB:24GiB:3",
                "--gpu-batch-size",
                "64",
                "--json",
                "--plot",
                str(tmp_path / "s.png"),
            ]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    rates = [row["plan"]["predicted_tokens_per_second"] if row["plan"] else 0 for row in rows]
    assert len(rates) == 3 and rates == sorted(rates) and rates[-1] > rates[0]
    assert (tmp_path / "s.png").stat().st_size > 5000


def test_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"flexbatch\[plot\]"):
        main([*ARGUMENTS, "--plot", str(tmp_path / "p.png")])


@pytest.mark.parametrize(
    "extra, code, words",
    [
        (["--model-shape", "opt-9000b"], 2, "opt-30b"),
        (["--hardware", "abacus"], 2, "shipped"),
        (["--cpu-attention", "2"], 2, "between 0 and 1"),
        (["--sweep", "gpu=1:2:3"], 2, "gpu_memory=8GiB"),
        (["--gpu-memory", "100MiB"], 4, "missing"),
    ],
)
def test_exit_codes(extra, code, words, capsys):
    assert main([*ARGUMENTS, *extra]) == code
    streams = capsys.readouterr()
    assert words in streams.err and not streams.out


def test_help_answers_without_heavy_imports():
    start = time.perf_counter()
    code = (
        "import sys; from flexbatch.policy.__main__ import parser; parser().format_help(); print([m for m in "
        "('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "name, billions",
    [("opt-30b", 30.0), ("opt-175b", 174.6), ("llama-3-8b", 8.03), ("llama-3-70b", 70.6), ("llama-3.2-1b", 1.236)],
)
def test_public_shapes_have_their_size(name, billions):
    assert public_shape(name).total_elements == pytest.approx(billions * 1e9, rel=0.005)
    assert name in names()


def test_shape_comes_back_from_json():
    shape = public_shape("llama-3-8b")
    assert ModelShape.from_dict(json.loads(json.dumps(shape.as_dict()))) == shape


@settings(deadline=None, max_examples=60)
@given(gpu=st.floats(0, 1), rest=st.floats(0, 1), name=st.sampled_from(["opt-1.3b", "opt-30b", "llama-3-70b"]))
def test_spread_weights_meet_the_split_to_one_tensor(gpu, rest, name):
    shape = public_shape(name)
    asked = Split(gpu, (1 - gpu) * rest, 1 - gpu - (1 - gpu) * rest)
    realised, largest = spread_weights(shape, asked)
    tensor = max(*shape.block_tensors, *shape.head_tensors, *shape.embedding_tensors) / shape.total_elements
    for want, have in zip(asked.fractions, realised.fractions, strict=True):
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
    # 64 rows, also of scored prompts, of which 2**21 logits are sampled from at a time.
    assert peak["gpu"]["logits"] == 4 * 64 * 50272 + 40 * 2**21
    assert peak["gpu"]["activations"] == 3 * (48 + 48 * 512) * 7168 * 2


def test_quantised_peak_counts_the_expansion():
    shape, hardware = public_shape("opt-30b"), load_hardware("h200")
    policy = Policy(Split(0.5, 0.5), Split(1, 0), Split(1, 0), 4, 1, 4, 4)
    rows = memory_rows(shape, hardware, Workload.uniform(512, 32), policy)
    assert rows["gpu"]["weight slabs"][0] == 2 * 12 * 7168 * 7168
    assert shape.token_bytes(4) == 2 * 56 * (64 + 2 * 4)
