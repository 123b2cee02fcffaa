"""Products of experts on a GPU at the sizes of real models: each dtype and form against float32 arithmetic over the
same weights, in launches and replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from flexbatch.kernels import expert_products, ops
from flexbatch.kernels.expert_codes import CodeForm, ExpertCodes, GatedActivation, stacks_of
from flexbatch.kernels.expert_products import CODED, PLAIN, ExpertLaunch

pytestmark = pytest.mark.gpu
FORMS = {
    "16 bits": CodeForm(),
    "8 bits": CodeForm(8, 64),
    "4 bits": CodeForm(4, 64),
    "mxfp4": CodeForm(4, 32, floats=True),
}
SIZES = {"qwen3-30b-a3b": (2048, 768, 128, 8), "mixtral": (4096, 14336, 8, 2), "gpt-oss": (2880, 2880, 128, 4)}
"""Hidden size, width, experts, choices."""


def matrices(form: CodeForm, experts: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor | ExpertCodes:
    if form.floats:
        codes = torch.randint(256, (experts, rows, columns // 2), dtype=torch.uint8, device="cuda")
        scales = torch.randint(117, 121, (experts, rows, columns // 32), dtype=torch.uint8, device="cuda")
        return ExpertCodes(codes, scales, columns, form)
    values = torch.empty(experts, rows, columns, dtype=dtype, device="cuda").normal_(std=columns**-0.5)
    return values if form.bits == 16 else ExpertCodes(*ops.quantize(values, form.bits, form.group), columns, form)


def oracle(x, chosen, shares, gate_up, down, gate: GatedActivation, biases) -> torch.Tensor:
    """In float32, one expert after another."""
    out = torch.zeros(len(x), x.shape[1], device="cuda")
    gate_up, down = stacks_of([(0, gate_up)]), stacks_of([(0, down)])
    for expert in chosen.unique().tolist():
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        first = F.linear(x[token].float(), gate_up.matrix(expert, x.dtype).float(), biases[0][expert].float())
        second = F.linear(gate(first), down.matrix(expert, x.dtype).float(), biases[1][expert].float())
        out.index_add_(0, token, second * shares[token, choice, None])
    return out


def drawn(name: str, form: str, dtype: torch.dtype, tokens: int, seed: int = 0):
    """Arguments of `expert_mlp` but for tables, and the two stacks. Uneven: low experts are chosen more often."""
    torch.manual_seed(seed)
    hidden, width, experts, choices = SIZES[name]
    gate_up = matrices(FORMS[form], experts, 2 * width, hidden, dtype)
    down = matrices(FORMS[form], experts, hidden, width, dtype)
    x = torch.randn(tokens, hidden, device="cuda").to(dtype)
    weight = torch.linspace(0.5, 1.5, experts, device="cuda")
    chosen = (torch.rand(tokens, experts, device="cuda") * weight).argsort(1)[:, :choices]
    shares = torch.rand(tokens, choices, device="cuda")
    biases = tuple(torch.randn(experts, size, device="cuda").to(dtype) / 4 for size in (2 * width, hidden))
    return (x, chosen, shares), (gate_up, down), biases


@pytest.fixture
def exact() -> Iterator[None]:
    """float32 products without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("tokens", [1, 37, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SIZES)
def test_real_sizes(name, form, dtype, tokens, exact):
    gate = GatedActivation("silu", 1.702, 7.0) if name == "gpt-oss" else GatedActivation()
    given, stacks, biases = drawn(name, form, dtype, tokens)
    tables = [stacks_of([(0, each)]) for each in stacks]
    found = expert_products.expert_mlp(*given, *tables, gate, biases).float()
    wanted = oracle(*given, *stacks, gate, biases)
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error < (0.008 if dtype == torch.bfloat16 else 0.001), f"relative error {error}"


LAUNCHES = [("16 bits", launch) for launch in PLAIN.values()] + [
    (form, launch) for form in ("8 bits", "4 bits", "mxfp4") for launch in CODED.values()
]


@pytest.mark.parametrize(("form", "launch"), LAUNCHES, ids=lambda each: str(getattr(each, "tokens", each)))
def test_every_launch(form, launch: ExpertLaunch, exact):
    given, stacks, biases = drawn("qwen3-30b-a3b", form, torch.bfloat16, 300)
    tables = [stacks_of([(0, each)]) for each in stacks]
    found = expert_products.expert_mlp(*given, *tables, GatedActivation(), biases, launch=launch).float()
    wanted = oracle(*given, *stacks, GatedActivation(), biases)
    assert (found - wanted).norm() / wanted.norm() < 0.008


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_graphs_equal_launches(form, dtype):
    """Bit for bit, with other tokens and other experts in every replay; also those that leave experts without any."""
    (x, chosen, shares), stacks, biases = drawn("qwen3-30b-a3b", form, dtype, 24)
    tables = [stacks_of([(0, each)]) for each in stacks]
    work = lambda: expert_products.expert_mlp(x, chosen, shares, *tables, GatedActivation(), biases)  # noqa: E731
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        chosen.copy_(torch.rand(24, 128, device="cuda").argsort(1)[:, :8] // (1 + 15 * (seed == 2)))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, work())


@pytest.mark.parametrize("form", ["8 bits", "4 bits", "mxfp4"])
def test_codes_become_the_numbers_that_expansion_gives(form):
    """Bit for bit: rows of the identity pick single weights."""
    stack = matrices(FORMS[form], 5, 2048, 768, torch.bfloat16)
    chosen = torch.tensor([1, 4], device="cuda").repeat_interleave(768)
    launch = CODED[64]
    order, tiles = expert_products.tiles_of(chosen, 5, launch.tokens)
    rows = torch.eye(768, dtype=torch.bfloat16, device="cuda").repeat(2, 1)
    rows = rows if form == "8 bits" else expert_products.halves(rows)
    found = expert_products.down_rows(rows, order, tiles, stacks_of([(0, stack)]), None, launch)
    wanted = stack.dense(torch.bfloat16)[[1, 4]].transpose(1, 2)
    assert torch.equal(found.view(2, 768, 2048), wanted)


def test_the_host_waits_for_nothing():
    given, stacks, biases = drawn("qwen3-30b-a3b", "4 bits", torch.bfloat16, 64)
    tables = [stacks_of([(0, each)]) for each in stacks]
    expert_products.expert_mlp(*given, *tables, GatedActivation(), biases)
    torch.cuda.set_sync_debug_mode("error")
    try:
        expert_products.expert_mlp(*given, *tables, GatedActivation(), biases)
    finally:
        torch.cuda.set_sync_debug_mode("default")
