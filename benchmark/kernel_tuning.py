"""Search for tile shapes on the GPU."""

from __future__ import annotations

from benchmark.kernel_cases import DECODE, PREFILL, Row, attention_call, seconds


def tuning_rows() -> list[Row]:
    """Every tile shape that compiles, on one prefill and one decode."""
    from flexbatch.kernels import attention

    rows: list[Row] = []
    for name, case, heights in (
        ("prefill", PREFILL["Llama-3-8B shape, 8 chunks of 512 at 4096"], (64, 128)),
        ("decode", DECODE["Llama-3-8B shape, 64 x 4096"], (16,)),
    ):
        call, options = attention_call(*case)
        for block_m in heights:
            for block_n in (32, 64, 128):
                for warps, stages in ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3)):
                    launch = attention.Launch(block_m, block_n, warps, stages)
                    try:
                        took = seconds(lambda: attention.paged_attention(*call, **options, launch=launch), 5, 1)  # noqa: B023
                    except Exception as error:  # a tile may want more shared memory than there is
                        rows.append({"kernel": name, "launch": str(launch), "error": str(error)[:80]})
                        continue
                    rows.append({"kernel": name, "launch": str(launch), "ms": took * 1e3})
    return rows
