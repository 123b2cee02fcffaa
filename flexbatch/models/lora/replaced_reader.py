"""Which rows of the embedding and of the head an adapter's file replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flexbatch.models.arch import Arch
from flexbatch.models.assignment import NUMBERS
from flexbatch.models.lora.peft_config import MERGE, PeftConfig
from flexbatch.models.lora.replaced import ReplacedRows
from flexbatch.models.lora.request import CONFIG_FILE
from flexbatch.models.source import StoredTensor, equal
from flexbatch.models.specs import weight_specs
from flexbatch.validation.errors import CheckpointError

TOKENS = ".token_adapter.trainable_tokens_delta"
"""What PEFT calls the rows of single tokens. They are the rows themselves, in spite of the name."""
SAVED = (".modules_to_save.default", ".modules_to_save")
"""Between the name of a module and its tensor, where the state of a model was saved as it is."""

COMPARED_ROWS = 4096


def plain_name(name: str) -> str:
    """A tensor's name as the model has it."""
    name = f"{name.removesuffix(TOKENS)}.weight" if name.endswith(TOKENS) else name
    for part in (".base_layer", *SAVED):
        name = name.replace(f"{part}.", ".")
    return name


class ReplacedReader:
    """Takes the tensors of a file one by one, and makes `ReplacedRows` of them. wrong: an error that names the file."""

    def __init__(self, config: PeftConfig, arch: Arch, wrong: Callable[[str], CheckpointError]) -> None:
        self.config, self.arch, self.wrong = config, arch, wrong
        self.tables = {"embed": -1, "head": arch.num_layers}
        specs = {spec.role: spec.shape for spec in weight_specs(arch)}
        self.shape = specs["embed.weight"]
        self.found: dict[str, StoredTensor] = {}
        """By role, with its suffix."""
        self.names: dict[str, str] = {}
        """Modules by role."""
        self.single: set[str] = set()
        """Roles of which single tokens were trained."""

    def takes(self, tensor: StoredTensor, name: str, role: str) -> bool:
        """Whether a tensor with this name, of a module with this role, was trained. Raises CheckpointError where it
        is of a module that cannot be replaced, or does not fit."""
        module, _, kind = plain_name(name).rpartition(".")
        single = name.endswith(TOKENS)
        both = self.arch.tie_word_embeddings and self.config.ties and self.config.modules_to_save
        if ".base_layer." in name or not (single or self.config.saves(module) or (both and role in self.tables)):
            return False
        if role not in self.tables:
            raise self.wrong(f"has a tensor {tensor.name}, trained whole: only embedding and head can be; {MERGE}")
        shape = self.shape if kind == "weight" else self.shape[:1]
        tokens = self.config.tokens_of(module) if single else ()
        wanted = (len(tokens), *shape[1:]) if single else shape
        if tensor.shape != wanted or not NUMBERS.match(tensor.dtype):
            why = f"{CONFIG_FILE} names {len(tokens)} tokens of {module}" if single else "its vocabulary was changed"
            raise self.wrong(
                f"has a tensor {tensor.name} of shape {list(tensor.shape)} and {tensor.dtype}, wanted {list(wanted)} "
                f"in floating-point numbers: {why}; {MERGE}"
            )
        if single and (len(set(tokens)) < len(tokens) or not all(0 <= token < shape[0] for token in tokens)):
            raise self.wrong(f"trains tokens {list(tokens)} of {module}, wanted different ones of {shape[0]}; {MERGE}")
        if f"{role}.{kind}" in self.found:
            raise self.wrong(f"has {self.found[f'{role}.{kind}'].name} and {tensor.name}, which both are {module}'s")
        self.found[f"{role}.{kind}"], self.names[role] = tensor, module
        if single:
            self.single.add(role)
        return True

    def read(self) -> tuple[ReplacedRows, ...]:
        """Raises CheckpointError where adapter_config.json names something that the file lacks."""
        rows = {role: self.rows(role, layer) for role, layer in self.tables.items() if f"{role}.weight" in self.found}
        for role in self.tables:
            if f"{role}.bias" in self.found and role not in rows:
                raise self.wrong(f"has a tensor {self.found[f'{role}.bias'].name}, but not the weight beside it")
        names = list(self.names.values())
        lacking = [name for name in self.config.trained if not any(each.endswith(name) for each in names)]
        if lacking:
            raise self.wrong(f"lacks tensors of {', '.join(lacking)}, which {CONFIG_FILE} says were trained; {MERGE}")
        return self.tied(rows)

    def rows(self, role: str, layer: int) -> ReplacedRows:
        weight, bias = self.found[f"{role}.weight"], self.found.get(f"{role}.bias")
        if role == "head" and bias is None and self.arch.head_bias and role not in self.single:
            raise self.wrong(f"has a tensor {weight.name}, but not the bias beside it")
        picked = torch.arange(weight.shape[0])
        tokens = torch.tensor(self.config.tokens_of(self.names[role])) if role in self.single else picked
        return ReplacedRows(layer, role, weight, bias, tokens, picked)

    def tied(self, rows: dict[str, ReplacedRows]) -> tuple[ReplacedRows, ...]:
        """Of a model whose table is the head, PEFT trains single tokens of the embedding in both, and whole tables
        where it was asked to."""
        if self.arch.tie_word_embeddings and rows:
            both = self.config.ties or "embed" in self.single
            known = rows.get("embed") or rows["head"]
            other = "head" if known.role == "embed" else "embed"
            if both and other not in rows:
                rows[other] = replace(known, role=other, layer=self.tables[other])
            elif other in rows and rows[other].bias is None and equal(known.weight, rows[other].weight):
                same = torch.equal(known.tokens, rows[other].tokens)
                rows[other] = replace(rows[other], weight=known.weight) if same else rows[other]
        return tuple(rows[role] for role in self.tables if role in rows)


def own_rows(rows: ReplacedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Which of the replaced rows are the model's own, bool by row. weight, bias: the model's, of the same tokens."""
    values, biases = rows.read()
    parts = zip(values.split(COMPARED_ROWS), weight.split(COMPARED_ROWS), strict=True)
    same = torch.cat([(value.float() == own.float()).all(1) for value, own in parts])
    return same if biases is None or bias is None else same & (biases.float() == bias.float())
