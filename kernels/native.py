"""Attention, cache writes and experts on the CPU in C, compiled on the machine at first use. Signatures as in
`reference` and `attention_reference`; experts are called by `native_experts`.

The library is built once per (sources, compiler, flags, processor) into a cache folder (see `native_cache`) and put
there by an atomic rename, so that processes starting together are safe. Calls release the interpreter's lock: a worker
thread can attend while others launch transfers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexbatch.kernels import native_cache
from flexbatch.kernels.attention_reference import AttentionOptions
from flexbatch.kernels.reference import token_bytes

SOURCES = tuple(sorted(path.name for path in Path(__file__).parent.glob("native_*.[ch]")))
# Infinities and NaN keep their meaning (masked scores are -inf): of -ffast-math only the harmless parts.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
OWN_FLAGS = {"native_quant.c": ("-ffp-contract=off",)}
"""Expanded weights are bit for bit those of the oracle, which rounds products before it adds."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class BuildError(RuntimeError):
    """There is no working C compiler, or nowhere to put the library."""


class Cache(ctypes.Structure):
    """`cache_t` of native_rows.h."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_bytes", "num_kv_heads", "head_dim", "bits", "group", "dtype")),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        ("cache", Cache),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "query",
                "out",
                "page_table",
                "query_starts",
                "context_lens",
                "tree_masks",
                "positions",
                "alibi_slopes",
                "sinks",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("num_sequences", "max_pages", "num_heads", "page_tokens", "mask_words", "window", "threads")
        ),
        *((name, ctypes.c_float) for name in ("scale", "soft_cap", "alibi_scale")),
    ]


Signatures = dict[str, tuple[type | None, tuple[Any, ...]]]
_POINTER, _NUMBER, _CACHE = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(Cache)
CODED: Signatures = {
    "flexbatch_has_tiles": (_NUMBER, ()),
    "flexbatch_coded_bytes": (_NUMBER, (_POINTER,)),
    "flexbatch_coded_linear": (None, (_POINTER,) * 2),
}
SIGNATURES: Signatures = {
    "flexbatch_attention_bytes": (_NUMBER, (ctypes.POINTER(_Attention),)),
    "flexbatch_paged_attention": (None, (ctypes.POINTER(_Attention), _POINTER)),
    "flexbatch_experts_bytes": (_NUMBER, (_POINTER,)),
    "flexbatch_expert_rows": (None, (_POINTER,) * 2),
    "flexbatch_append_rows": (None, (_CACHE, *(_POINTER,) * 3, *(_NUMBER,) * 4)),
    "flexbatch_expand_weights": (None, (_CACHE, *(_POINTER,) * 3, *(_NUMBER,) * 2)),
    "flexbatch_fit_weights": (None, (_CACHE, *(_POINTER,) * 3, _NUMBER, _POINTER, *(_NUMBER,) * 3)),
    **CODED,
}
"""Of every function its result and its arguments."""


def _processor() -> str:
    """The features that -march=native depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _openmp_flags() -> tuple[str, ...]:
    """Link against the OpenMP runtime that torch has loaded already: two runtimes' idle threads would spin against
    each other."""
    libraries = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")) + sorted(
        Path(torch.__file__).parent.parent.glob("torch.libs/libgomp*.so*")
    )
    return (str(libraries[0]),) if libraries else ("-fopenmp",)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _compile(compiler: str, sources: list[Path], cache_folder: Path, key: str) -> Path:
    """Path of the library, compiled and put into the cache folder. Raises BuildError, OSError."""
    errors = []
    for compile_flags, link_flags in ((("-fopenmp",), _openmp_flags()), (("-fopenmp",), ("-fopenmp",)), ((), ())):
        with tempfile.TemporaryDirectory(dir=cache_folder) as folder:
            objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
            commands = [
                [compiler, *FLAGS, *compile_flags, *OWN_FLAGS.get(source.name, ()), "-c", str(source), "-o", item]
                for source, item in zip(sources, objects, strict=True)
            ]
            with ThreadPoolExecutor(len(commands)) as pool:  # a run waits for it
                results = list(pool.map(_run, commands))
            results.append(_run([compiler, "-shared", *objects, *link_flags, "-lm", "-o", f"{folder}/library.so"]))
            if all(result.returncode == 0 for result in results):
                return native_cache.put(cache_folder, key, Path(folder) / "library.so")
            errors.append("".join(result.stderr for result in results)[:500])
    raise BuildError(f"{compiler} does not build {', '.join(source.name for source in sources)}: {errors[-1]}")


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(cache_folder: Path) -> Path:
    """Path of the library in ``cache_folder``, built unless it is there. Raises BuildError."""
    compiler = _compiler()
    if compiler is None:
        raise BuildError("no C compiler (cc, gcc or clang) on the PATH")
    here = Path(__file__).parent
    version = _run([compiler, "--version"]).stdout
    parts = [
        version,
        f"{FLAGS} {OWN_FLAGS}",
        str(_openmp_flags()),
        _processor(),
        *((here / name).read_text() for name in SOURCES),
    ]
    key = f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    cache_folder = cache_folder.absolute()
    try:
        native_cache.prepare(cache_folder)
        sources = [here / name for name in SOURCES if name.endswith(".c")]
        return native_cache.find(cache_folder, key) or _compile(compiler, sources, cache_folder, key)
    except native_cache.UnsafeFolder as error:
        raise BuildError(
            f"compiled kernels are not kept where they could be another user's: {error}; remove it"
        ) from error
    except OSError as error:
        raise BuildError(f"cannot write the compiled kernels into {cache_folder}: {error}; make it writable") from error


def _load(cache_folder: Path) -> ctypes.CDLL:
    """The library from the cache folder; from one of this process's own where that one cannot be used. Raises
    BuildError, OSError."""
    try:
        return ctypes.CDLL(str(build(cache_folder)))
    except BuildError as error:
        if _compiler() is None:
            raise
        with native_cache.private_folder() as folder:
            loaded = ctypes.CDLL(str(build(folder)))
        warnings.warn(
            f"the kernels for CPU attention were compiled for this process alone, as at every start: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return loaded


@functools.cache
def library(cache_folder: Path | None = None) -> ctypes.CDLL | None:
    """The compiled kernels, or None (after one warning) where they cannot be built; then `ops` takes `reference`."""
    try:
        loaded = _load(cache_folder or native_cache.user_cache_folder("native"))
    except (BuildError, OSError) as error:
        warnings.warn(f"CPU attention runs in plain torch, several times slower: {error}", RuntimeWarning, stacklevel=2)
        return None
    return declared(loaded, SIGNATURES)


def declared(loaded: ctypes.CDLL, signatures: Signatures) -> ctypes.CDLL:
    """The library, its functions' arguments and results made known."""
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, list(arguments)
    return loaded


def _cache(rows: Tensor, num_kv_heads: int, head_dim: int, bits: int, group: int, dtype: torch.dtype) -> Cache:
    assert rows.is_contiguous() or rows[:1].is_contiguous(), (
        f"a token row must be contiguous, got strides {rows.stride()}"
    )
    row_bytes, needed = (
        rows.stride(0) * rows.element_size(),
        token_bytes(num_kv_heads, head_dim, bits, group, dtype.itemsize),
    )
    assert row_bytes >= needed, (
        f"a token row of {num_kv_heads} heads of {head_dim} at {bits} bits takes {needed} bytes, these have {row_bytes}"
    )
    return Cache(rows.data_ptr(), row_bytes, num_kv_heads, head_dim, bits, group, DTYPES[dtype])


def paged_attention(
    query: Tensor,
    rows: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    out: Tensor | None = None,
    threads: int = 0,
    **options: Any,
) -> Tensor:
    """`attention_reference.paged_attention` on ``threads`` processor threads (0: torch's number), which meet once: each
    meeting of 16 sleeping threads costs 50 to 100 microseconds, so that queries and results are converted where they
    are used."""
    loaded = library()
    assert loaded is not None, "no compiled kernels on this machine"
    chosen = AttentionOptions(**options)
    assert chosen.tree_masks is None or chosen.positions is not None, "a tree needs the depth of every query token"
    num_heads, head_dim = query.shape[1:]
    integers = page_table, query_starts, context_lens, chosen.tree_masks, chosen.positions
    dense = [
        x if x is None or (x.dtype == dtype and x.is_contiguous()) else x.to(dtype).contiguous()
        for tensors, dtype in ((integers, torch.int32), ((chosen.alibi_slopes, chosen.sinks), torch.float32))
        for x in tensors
    ]
    query = query.contiguous()
    result = torch.empty_like(query) if out is None else out
    assert result.is_contiguous() and result.dtype == query.dtype and result.shape == query.shape, (
        "out must be dense and like the query"
    )
    attention = _Attention(
        _cache(rows, chosen.num_kv_heads, head_dim, chosen.bits, chosen.group, query.dtype),
        query.data_ptr(), result.data_ptr(), *[None if x is None else x.data_ptr() for x in dense],
        page_table.shape[0], page_table.shape[1], num_heads, chosen.page_tokens,
        0 if chosen.tree_masks is None else chosen.tree_masks.shape[1],
        -chosen.window if chosen.chunked else chosen.window, threads or torch.get_num_threads(), chosen.scale,
        chosen.soft_cap, chosen.alibi_scale,
    )  # fmt: skip
    # torch's allocator aligns to 64 bytes on the CPU.
    workspace = torch.empty(loaded.flexbatch_attention_bytes(ctypes.byref(attention)), dtype=torch.uint8)
    loaded.flexbatch_paged_attention(ctypes.byref(attention), workspace.data_ptr())
    return result


def append_rows(
    rows: Tensor, slots: Tensor, key: Tensor, value: Tensor, bits: int = 16, group: int = 64, *, threads: int = 0
) -> None:
    """`reference.append_rows` on ``threads`` processor threads (0: torch's number)."""
    loaded = library()
    assert loaded is not None, "no compiled kernels on this machine"
    num_tokens, num_kv_heads, head_dim = key.shape
    cache = _cache(rows, num_kv_heads, head_dim, bits, group, key.dtype)
    key, value = (x if x.stride()[1:] == (head_dim, 1) else x.contiguous() for x in (key, value))
    slots = slots.contiguous()
    loaded.flexbatch_append_rows(
        ctypes.byref(cache),
        slots.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        key.stride(0),
        value.stride(0),
        num_tokens,
        threads or torch.get_num_threads(),
    )
