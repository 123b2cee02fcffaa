"""What can be said of a model without reading its weights: files, formats, sizes, tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexbatch.models import checkpoint
from flexbatch.models.arch import Arch
from flexbatch.models.gguf.header import read_header
from flexbatch.models.gguf.parts import is_gguf, parts_of
from flexbatch.models.opened import OpenModel
from flexbatch.models.source import StoredTensor, list_tensors, weight_files
from flexbatch.models.specs import weight_specs
from flexbatch.validation.errors import CheckpointError


def describe_files(path: Path) -> dict[str, Any]:
    """Of a folder or GGUF file: the format, the files that hold the weights, their bytes, and the number of tensors of
    each type. Raises CheckpointError."""
    if is_gguf(path):
        header = read_header(path)
        form, files = f"GGUF version {header.version}, architecture {header.architecture}", parts_of(path)
        tensors: Iterable[StoredTensor] = header.tensors.values()
    else:
        files, tensors = weight_files(path), list_tensors(path)
        quantization = checkpoint.quantization_of(path)
        form = "safetensors" if files[0].suffix == ".safetensors" else "PyTorch"
        if quantization is not None:
            form += f", {quantization}"
    return {
        "path": str(path),
        "format": form,
        "files": [file.name for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "tensor_types": dict(Counter(tensor.dtype for tensor in tensors).most_common()),
    }


def describe_arch(arch: Arch) -> dict[str, Any]:
    window = f"{arch.sliding_window} in {sum(arch.sliding_layers) or arch.num_layers} layers"
    return {
        "family": arch.family,
        "parameters": sum(spec.numel for spec in weight_specs(arch)),
        "layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "experts": _describe_experts(arch),
        "latent": _describe_latent(arch),
        "heads": arch.num_heads,
        "kv_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "context": arch.max_positions,
        "positions": arch.position if arch.rope_scaling is None else f"{arch.position}, {arch.rope_scaling.kind}",
        "window": window if arch.sliding_window else None,
        "tied_embeddings": arch.tie_word_embeddings,
        "stop_tokens": list(arch.eos_token_ids),
        "dtype": arch.dtype,
    }


def _describe_latent(arch: Arch) -> dict[str, int] | None:
    """None where every head has keys and values of its own."""
    latent = arch.latent
    if latent is None:
        return None
    return {
        "rank": latent.rank,
        "rotated": latent.rope,
        "query_rank": latent.query_rank,
        "cached_per_token_and_layer": latent.width,
    }


def _describe_experts(arch: Arch) -> dict[str, Any] | None:
    """None for a model without."""
    experts = arch.experts
    if experts is None:
        return None
    layers = sum(arch.experts_of(layer) is not None for layer in range(arch.num_layers))
    spared = layers * (experts.count - experts.top_k) * 3 * arch.hidden_size * experts.width
    return {
        "layers": layers,
        "count": experts.count,
        "chosen": experts.top_k,
        "width": experts.width,
        "shared_width": experts.shared_width,
        "scoring": experts.scoring,
        "active_parameters": sum(spec.numel for spec in weight_specs(arch)) - spared,
    }


def describe_tokenizer(model: OpenModel) -> dict[str, Any]:
    """With the chat template; "error" says why there is no tokenizer."""
    try:
        tokenizer = model.tokenizer
    except CheckpointError as error:
        return {"error": str(error)}
    if tokenizer is None:
        return {"error": "random weights have no tokenizer"}
    special = {name: getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad", "unk")}
    return {
        "kind": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "special": {name: token for name, token in special.items() if token is not None},
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
