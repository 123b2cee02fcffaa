"""Random LoRA adapters as folders that PEFT would save, and what transformers computes with them: hooks that add
``scale * B(A(x))`` to a module's output, which is what PEFT does."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

TOKENS = ".token_adapter.trainable_tokens_delta"
NO_UPDATE = re.compile(r"router(\.layer)?$|\.wg$|kv_b_proj$|shared_expert_gate$")
"""Modules that cannot have one: routers, gates, and what leads out of the space of a latent in two directions."""


def linear_modules(model: PreTrainedModel, head: bool = False) -> list[str]:
    """Names of what "all-linear" means, and of the head, too, where it is wanted; nothing that sees images."""
    last = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and (head or module is not last)
        and "vision" not in name
        and "projector" not in name
        and not NO_UPDATE.search(name)
    ]


def embedding(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_input_embeddings())


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs)."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    outputs, inputs = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    return outputs, inputs


def write_adapter(
    folder: Path,
    model: PreTrainedModel,
    modules: list[str],
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8,
    strength: float = 0.5,
    binary: bool = False,
    saved: Sequence[str] = (),
    tokens: Mapping[str, Sequence[int]] | None = None,
    **config: Any,
) -> Path:
    """A folder with random factors for these modules. strength: of their product beside the weights, about. saved:
    modules that are trained whole, as PEFT trains them with ``modules_to_save``; tokens: single rows of some."""
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": modules,
        "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "init_lora_weights": True,
        "modules_to_save": list(saved) or None, "trainable_token_indices": tokens, **config,
    }  # fmt: skip
    tensors = {}
    for name in modules:
        module = model.get_submodule(name)
        outputs, inputs = sizes_of(module)
        own, scale = rank_and_scale(settings, name)
        embeds = isinstance(module, nn.Embedding)
        down = torch.randn(own, inputs, generator=generator)
        up = torch.randn(outputs, own, generator=generator)
        factor = strength / scale * own**-0.5 * (1.0 if embeds else inputs**-0.5)
        ends = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A.weight", "lora_B.weight")
        tensors[f"base_model.model.{name}.{ends[0]}"] = down
        tensors[f"base_model.model.{name}.{ends[1]}"] = up * factor
    for name in saved:
        for kind, parameter in model.get_submodule(name).named_parameters():
            tensors[f"base_model.model.{name}.{kind}"] = drawn_like(parameter, strength, generator)
    for name, chosen in (tokens or {}).items():
        rows = model.get_submodule(name).weight[list(chosen)]
        tensors[f"base_model.model.{name}{TOKENS}"] = drawn_like(rows, strength, generator)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def drawn_like(weight: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """A weight and noise beside it."""
    scale = strength * (weight.std() if weight.numel() > 1 else 1.0)
    return weight.detach() + scale * torch.randn(weight.shape, generator=generator)


def rank_and_scale(settings: dict[str, Any], name: str) -> tuple[int, float]:
    """As PEFT has them."""

    def found(pattern: str, default: Any) -> Any:
        keys = (key for key in settings[pattern] if re.match(rf"(.*\.)?({key})$", name))
        return next((settings[pattern][key] for key in keys), default)

    rank = found("rank_pattern", settings["r"])
    alpha = found("alpha_pattern", settings["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


@contextlib.contextmanager
def adapted(model: PreTrainedModel, folder: Path | None) -> Iterator[None]:
    """The model computes with an adapter in the body; None: without."""
    handles = []
    if folder is not None:
        settings = json.loads((folder / "adapter_config.json").read_text())
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path) if path.is_file() else torch.load(folder / "adapter_model.bin")
        for key in list(tensors):
            found = re.fullmatch(r"base_model\.model\.(.*)\.(lora_A\.weight|lora_embedding_A)", key)
            if found is not None:
                up = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
                scale = rank_and_scale(settings, found[1])[1]
                module = model.get_submodule(found[1])
                handles.append(module.register_forward_hook(adding(tensors[key], up, scale)))
        for module, table, bias in tables(model, settings, tensors):
            handles.append(module.register_forward_hook(replacing(table, bias)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adding(down: torch.Tensor, up: torch.Tensor, scale: float) -> Any:
    def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        (x,) = arguments
        if isinstance(module, nn.Embedding):
            return output + down.t()[x] @ up.t() * scale * getattr(module, "embed_scale", 1.0)
        return output + x @ down.t() @ up.t() * scale

    return hook


def tables(
    model: PreTrainedModel, settings: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Iterator[tuple[nn.Module, torch.Tensor, torch.Tensor | None]]:
    """Modules with the table and the bias that they have instead of their own. Single rows of an embedding that is
    the head as well are those of both."""
    for name in settings["modules_to_save"] or ():
        key = f"base_model.model.{name}"
        yield model.get_submodule(name), tensors[f"{key}.weight"], tensors.get(f"{key}.bias")
    single = settings["trainable_token_indices"] or {}
    for name, tokens in single.items():
        module = model.get_submodule(name)
        table = module.weight.detach().clone()
        table[tokens] = tensors[f"base_model.model.{name}{TOKENS}"]
        yield module, table, getattr(module, "bias", None)
        head = model.get_output_embeddings()
        if module is not head and module.weight is head.weight and len(single) == 1:
            yield head, table, head.bias


def replacing(table: torch.Tensor, bias: torch.Tensor | None) -> Any:
    def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        (x,) = arguments
        if isinstance(module, nn.Embedding):
            return table[x] * getattr(module, "embed_scale", 1.0)
        return nn.functional.linear(x, table, bias)

    return hook
