"""``python -m tests.kernels.hopper_forms``: what kernels become for Hopper, for which it takes no GPU. A process of its
own: Triton decides at import whether kernels are interpreted."""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flexbatch.kernels.coded_gemm import choose_launch
from flexbatch.kernels.coded_gemm_kernels import coded_gemm_kernel

CASES = ((4, 256), (8, 256), (8, 64))
"""Bits, tokens."""


def coded_gemm_form(bits: int, tokens: int) -> str:
    """`coded_gemm_kernel` before machine code."""
    launch, names = choose_launch(tokens), coded_gemm_kernel.function.arg_names
    constants = {"BIASED": False, "BITS": bits, "GROUP": 64, "CHUNK": 64, "BLOCK_R": launch.rows, "SPLITS": 1}
    constants |= {"BLOCK_T": launch.tokens, "STAGES": launch.stages, "COMPILED": True}
    pointers = {"arranged": "*bf16", "words": "*i32", "parameters": "*bf16", "bias": "*bf16", "out": "*bf16"}
    aligned = [*pointers, "num_rows", "columns", "lift"]
    source = ASTSource(
        fn=coded_gemm_kernel.function,
        signature={name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"])


if __name__ == "__main__":
    print(json.dumps([coded_gemm_form(*case) for case in CASES]))
