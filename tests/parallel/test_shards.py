"""What each rank has of a model: all of it together, no group of one scale cut, and the first rank the most."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from flexbatch.config import EngineConfig
from flexbatch.kernels import reference
from flexbatch.models.arch import Arch
from flexbatch.models.dummy import dummy
from flexbatch.models.quantized.scheme import Form, QuantizedPiece
from flexbatch.models.shapes import shape
from flexbatch.models.shard import columns, heads, width
from flexbatch.models.sharding import kept_rows, scale_groups, shard_of, sharded, shards
from flexbatch.models.specs import weight_specs
from flexbatch.planner.budgets import resolve_budgets
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.shared_host import shared_by
from flexbatch.validation.errors import ConfigurationError


@given(kv=st.integers(1, 12), per_kv=st.integers(1, 9), ranks=st.integers(1, 12), group=st.sampled_from([1, 16, 64]))
@example(kv=1, per_kv=71, ranks=2, group=64)
@example(kv=2, per_kv=4, ranks=3, group=1)
def test_every_head_of_queries_is_on_one_rank_beside_its_keys(kv, per_kv, ranks, group):
    head_dim = 16
    try:
        found = heads(kv * per_kv, kv, head_dim, ranks, group)
    except ConfigurationError:
        assume(False)
    assert [queries[0] for queries, _, _ in found] == [0, *(queries[1] for queries, _, _ in found[:-1])]
    assert found[-1][0][1] == kv * per_kv
    owned = [head for _, keys, owner in found if owner for head in range(*keys)]
    assert sorted(owned) == list(range(kv)), "keys that norms over all heads count once"
    for queries, keys, _ in found:
        assert width(queries) > 0 and width(queries) % width(keys) == 0
        of_one = width(queries) // width(keys)
        assert [keys[0] + i // of_one for i in range(width(queries))] == [i // per_kv for i in range(*queries)]
        assert queries[0] * head_dim % group == 0
        assert width(queries) <= width(found[0][0]) and width(keys) <= width(found[0][1])


@given(size=st.integers(1, 3000), ranks=st.integers(1, 9), group=st.sampled_from([1, 2, 32, 64, 128]))
def test_columns_are_shared_out_whole(size, ranks, group):
    try:
        parts = columns(size, ranks, group, "x")
    except ConfigurationError:
        assert -(-size // group) < ranks
        return
    assert [first for first, _ in parts] == [0, *(end for _, end in parts[:-1])] and parts[-1][1] == size
    assert all(first % group == 0 and 0 < end - first <= width(parts[0]) for first, end in parts)
    if size % ranks == 0 and size // ranks % group == 0:
        assert len(set(map(width, parts))) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: heads(12, 4, 16, 16, 1), "16: this model has 12 heads of queries and 4 of .*; give at most 12"),
        (lambda: heads(4, 4, 80, 2, 64), "cut where no 64 weights with one scale are; give at most 1"),
        (lambda: columns(100, 4, 64, "the MLP"), "the 100 columns of the MLP are 2 groups of 64 .*at most 2"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_the_numbers(make, said):
    with pytest.raises(ConfigurationError, match=said):
        make()


def test_latent_attention_is_refused():
    with pytest.raises(ConfigurationError, match=r"tensor_parallel_size=2: every head of latent attention reads"):
        shards(shape("deepseek-v2-lite"), 2, {})


WHOLE_ALONE = ("deepseek-v2-lite", "deepseek-v3")
QUICK = ("opt-350m", "falcon-7b", "olmoe-1b-7b", "gpt-oss-20b")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in SHAPES
        if name not in WHOLE_ALONE
    ],
)
def test_the_weights_of_a_rank_are_those_of_its_architecture(name):
    arch = shape(name)
    whole = {(spec.layer, spec.role): spec for spec in weight_specs(arch)}
    for ranks in (2, 3, 8):
        for shard in shards(arch, ranks, scale_groups(arch, (16, 4), {})):
            for spec in weight_specs(shard_of(arch, shard)):
                wanted = list(whole[spec.layer, spec.role].shape)
                if spec.split_rows:
                    wanted[0] = sum(end - first for first, end in kept_rows(whole[spec.layer, spec.role], shard))
                if spec.split_columns:
                    wanted[1] = sum(width(shard.rows_of(unit)) for unit in spec.split_columns)
                assert spec.shape == tuple(wanted), spec


def small(**changes) -> Arch:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 5, "num_kv_heads": 1, "head_dim": 4}
    more = {"intermediate_size": 13, "vocab_size": 11, "max_positions": 9, "rotary_dim": 4, "output_bias": True}
    return Arch("llama", **{**sizes, **more, **changes})


@pytest.mark.parametrize("ranks", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_pieces_of_all_ranks_are_the_model(ranks):
    """Of rows, of columns, and of biases that are added once."""
    arch = small(qkv_bias=True, mlp_bias=True)
    whole = {piece.role: piece.tensor for piece in dummy(arch)}
    parts = []
    for shard in shards(arch, ranks, {}):
        tensors = {}
        for piece in sharded(dummy(arch), arch, shard):
            tensors.setdefault(piece.role, []).append((piece.rows, piece.tensor))
        parts.append((shard, {role: torch.cat([value for _, value in found]) for role, found in tensors.items()}))
    query, keys = 5 * 4, 4
    for role in ("o.weight", "down.weight"):
        assert torch.equal(torch.cat([found[role] for _, found in parts], 1), whole[role])
    for role in ("o.bias", "down.bias"):
        assert torch.equal(sum(found[role] for _, found in parts), whole[role])
    for role in ("embed.weight", "head.weight"):
        assert torch.equal(torch.cat([found[role] for _, found in parts]), whole[role])
    for role in ("qkv.weight", "qkv.bias"):
        assert torch.equal(
            torch.cat([found[role][: width(shard.heads) * 4] for shard, found in parts]), whole[role][:query]
        )
        for shard, found in parts:
            assert torch.equal(found[role][width(shard.heads) * 4 :], whole[role][query : query + 2 * keys])
    inner = [found["gate_up.weight"].split(width(shard.inner)) for shard, found in parts]
    assert torch.equal(torch.cat([gate for gate, _ in inner] + [up for _, up in inner]), whole["gate_up.weight"])
    assert all(torch.equal(found["attn_norm.weight"], whole["attn_norm.weight"]) for _, found in parts)


@pytest.mark.parametrize(("bits", "group"), [(4, 4), (8, 4), (4, 64), (8, 64)])
def test_codes_of_a_checkpoint_are_cut_between_groups_or_have_one_scale(bits, group):
    arch = small(intermediate_size=24)
    values = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    codes, parameters = reference.quantize(values, bits, group)
    piece = QuantizedPiece(0, "down.weight", None, codes, parameters, bits, group)
    groups = scale_groups(arch, (16,), {"down.weight": Form(bits, group)})
    assert groups == {"heads": 1, "inner": 4 if group == 4 else 2}
    cut = [next(iter(sharded([piece], arch, shard))) for shard in shards(arch, 3, groups)]
    assert torch.equal(torch.cat([part.dense().tensor for part in cut], 1), piece.dense().tensor)


def test_slopes_of_alibi_are_those_of_the_heads():
    arch = small(num_heads=12, num_kv_heads=12, position="alibi")
    parts = [shard_of(arch, shard).alibi_slopes() for shard in shards(arch, 5, {})]
    assert [slope for part in parts for slope in part] == arch.alibi_slopes()


def test_ranks_of_a_host_share_what_is_not_their_gpus(tmp_path):
    config = EngineConfig(cpu_memory="1GiB", offload_dir=str(tmp_path))
    machine = load_hardware("h200")
    one, four = (resolve_budgets(config, torch.device("cuda"), machine, local_ranks=ranks) for ranks in (1, 4))
    assert four == {"gpu": one["gpu"], "cpu": one["cpu"] // 4, "disk": one["disk"] // 4}
    rank = shared_by(machine, 4)
    assert (rank.h2d, rank.gemm, rank.disk_read) == (machine.h2d, machine.gemm, machine.disk_read / 4)
    assert rank.cpu_attention.values[0] == machine.cpu_attention.values[0] / 4
    cpu = load_hardware("cpu")
    assert shared_by(cpu, 2).gemm.values[0] == cpu.gemm.values[0] / 2
    given = EngineConfig(gpu_memory="1GiB", offload_dir=str(tmp_path))
    assert resolve_budgets(given, torch.device("cpu"), local_ranks=2)["gpu"] == 2**30
