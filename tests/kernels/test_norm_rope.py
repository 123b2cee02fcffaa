"""Norms, rotary embedding and gated activations in Triton against torch."""

import pytest
import torch

from flexbatch.kernels import reference

DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture
def norm_rope(device):
    from flexbatch.kernels import norm_rope

    return norm_rope


def close(got, wanted):
    torch.testing.assert_close(got.cpu(), wanted, atol=TOLERANCE[wanted.dtype], rtol=TOLERANCE[wanted.dtype])


@pytest.mark.parametrize("size", [64, 100, 1])
@pytest.mark.parametrize(("offset", "wide"), [(0.0, False), (1.0, False), (0.0, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_residual(dtype, offset, wide, size, norm_rope, device):
    x, residual, weight = torch.randn(5, size).to(dtype), torch.randn(5, size).to(dtype), torch.randn(size).to(dtype)
    carried = residual.to(device, copy=True)
    got = norm_rope.rms_norm(x.to(device), weight.to(device), 1e-5, residual=carried, offset=offset, wide=wide)
    close(got, reference.rms_norm(x, weight, 1e-5, residual=residual, offset=offset, wide=wide))
    assert torch.equal(carried.cpu(), residual), "the residual carries the sum"


def test_rms_norm_of_heads_in_a_fused_projection(norm_rope, device):
    fused, weight = torch.randn(6, 5 * 16), torch.randn(16)
    heads = fused.to(device)[:, 16:48].unflatten(-1, (2, 16))
    close(
        norm_rope.rms_norm(heads, weight.to(device), 1e-6),
        reference.rms_norm(fused[:, 16:48].unflatten(-1, (2, 16)), weight, 1e-6),
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype, affine, norm_rope, device):
    torch.manual_seed(int(affine))  # a mean of 7 leaves 8e-7 of each number open, times the weight
    x = (torch.randn(5, 100) + 7).to(dtype)
    weight, bias = (torch.randn(100).to(dtype), torch.randn(100).to(dtype)) if affine else (None, None)
    on_device = [None if p is None else p.to(device) for p in (weight, bias)]
    close(norm_rope.layer_norm(x.to(device), *on_device, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))


@pytest.mark.parametrize("rotary_dim", [40, 20])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_in_place(dtype, interleaved, rotary_dim, norm_rope, device):
    fused = torch.randn(6, 8 * 40).to(dtype)
    cos, sin, positions = *torch.randn(2, 50, rotary_dim // 2).to(dtype), torch.randperm(50)[:6]
    turned = fused.to(device, copy=True)
    for x, tables, operation in ((fused, (cos, sin, positions), reference.rotary), (turned, None, norm_rope.rotary)):
        query, key, _ = (part.unflatten(-1, (-1, 40)) for part in x.split([160, 80, 80], dim=-1))
        operation(
            query,
            key,
            *(tables or (t.to(device) for t in (cos, sin, positions))),
            rotary_dim=rotary_dim,
            interleaved=interleaved,
        )
    torch.testing.assert_close(
        turned.cpu(), fused, atol=5e-6 if dtype == torch.float32 else 1e-2, rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation(dtype, activation, norm_rope, device):
    gate_up = torch.randn(5, 2 * 70).to(dtype)
    close(norm_rope.gated_activation(gate_up.to(device), activation), reference.gated_activation(gate_up, activation))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_gate(dtype, norm_rope, device):
    """Beyond the limit on either side, and what is no number stays none."""
    gate_up = 3 * torch.randn(5, 2 * 70).to(dtype)
    gate_up[1, 3] = gate_up[2, 80] = torch.nan
    found, wanted = norm_rope.clamped_gate(gate_up.to(device), 1.7, 2.0), reference.clamped_gate(gate_up, 1.7, 2.0)
    torch.testing.assert_close(found.cpu(), wanted, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype], equal_nan=True)
    assert wanted.isnan().sum() == 2


def test_16_bits_of_a_wide_norm_are_those_of_gpt_oss():
    """Rounded once, after the weight."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

    norm = GptOssRMSNorm(64, 1e-5).to(torch.bfloat16)
    norm.weight.data.normal_(1, 0.5)
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5, wide=True), norm(x))
    assert not torch.equal(reference.rms_norm(x, norm.weight, 1e-5), norm(x))


def test_rotary_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = torch.randn(7, 3, 16), torch.randn(7, 1, 16)
    angles = torch.randn(7, 8)
    wanted = apply_rotary_pos_emb(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        torch.cat([angles.cos()] * 2, -1)[None],
        torch.cat([angles.sin()] * 2, -1)[None],
    )
    reference.rotary(query, key, angles.cos(), angles.sin(), torch.arange(7), rotary_dim=16)
    assert torch.equal(query, wanted[0][0].transpose(0, 1))
    assert torch.equal(key, wanted[1][0].transpose(0, 1))
