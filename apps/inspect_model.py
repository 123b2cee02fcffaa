"""What a model is and what would become of it, without loading its weights.

    flexbatch inspect smollm2
    flexbatch inspect model.gguf --gpu-memory 8GiB --json

Family, sizes, formats, tokenizer, chat template, how its weights would be stored, and in one line where everything
would be for a typical job (256 requests of 512 prompt tokens and 128 generated ones). A Hub id is downloaded first. The
exit code is 4 where the plan does not fit the budgets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from flexbatch.cli.command import run_command, set_up_logging
from flexbatch.cli.early_checks import check_engine
from flexbatch.cli.help import CommandParser
from flexbatch.cli.settings import add_arguments, add_engine_arguments, read_settings
from flexbatch.config import EngineConfig, option
from flexbatch.policy.stdout import run_process
from flexbatch.policy.units import size_text
from flexbatch.validation.errors import DOES_NOT_FIT, DONE, CheckpointError, ConfigurationError, DoesNotFitError

if TYPE_CHECKING:
    from flexbatch.memory.weight_plan import WeightPlan
    from flexbatch.models.opened import OpenModel
    from flexbatch.planner.engine_plan import EnginePlan


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    json: bool = option(False, "print one JSON object")


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "flexbatch inspect",
        description="What a model is, how its weights would be stored, and where everything would be for a typical job "
        "(256 requests of 512 prompt tokens and 128 generated ones); its weights are not loaded. Exit code 4: it does "
        "not fit.",
        first="model json gpu_memory cpu_memory weight_bits cache_bits hardware config",
        texts={
            "json": "print one JSON object",
            "cache_bits": "16, 8 or 4",
            "hardware": "plan for another machine: t4, h200, a JSON file",
        },
        examples="""
            flexbatch inspect demo
            flexbatch inspect model.gguf --gpu-memory 8GiB --json
            """,
    )
    parser.add_argument("name", nargs="?", metavar="MODEL", help="the same as --model")
    add_arguments(parser, InspectConfig, "inspection")
    add_engine_arguments(parser)
    return parser


def inspect(engine: EngineConfig) -> dict[str, Any]:
    """Everything that is told, by stable names; "plan" is a line, or None beside "plan_error". Raises CheckpointError
    for what could not run: weights that are not those of the configuration, adapters of another model."""
    from flexbatch.models import checkpoint, inspection
    from flexbatch.models.opened import open_configured

    model = open_configured(engine)
    model.check()
    files = (
        {"path": None, "format": "random weights"} if model.folder is None else inspection.describe_files(model.folder)
    )
    found: dict[str, Any] = {
        "model": engine.model,
        **files,
        **inspection.describe_arch(model.arch),
        "codes": None if model.folder is None else checkpoint.summary(model.folder, model.arch, model.prequantized),
        "tokenizer": inspection.describe_tokenizer(model),
        "plan": None,
    }
    try:
        plan = make_plan(engine, model)
    except DoesNotFitError as error:
        found |= {"plan_error": str(error), "fits": False}
        weights = weights_alone(engine, model)
    except CheckpointError as error:
        if "error" not in found["tokenizer"]:
            raise  # of an adapter, or a draft
        found |= {"plan_error": str(error)}
        weights = weights_alone(engine, model)
    else:
        found |= {"plan": plan_line(plan), "fits": True}
        weights = plan.weight_plan
    return found | {"stored": stored(weights)}


def make_plan(engine: EngineConfig, model: OpenModel) -> EnginePlan:
    from flexbatch.planner.planner import Planner

    return Planner(engine, dry=True, model=model).engine_plan


def weights_alone(engine: EngineConfig, model: OpenModel) -> WeightPlan:
    """How the weights would be stored where no plan was found."""
    from flexbatch.memory.weight_plan import plan_weights
    from flexbatch.planner.budgets import resolve_device, resolve_dtype
    from flexbatch.policy.limits import weight_group
    from flexbatch.policy.policy import Split

    dtype = resolve_dtype(engine.dtype, model.arch, resolve_device(engine.device))
    group = weight_group(model.arch.hidden_size)
    return plan_weights(model.arch, Split(1, 0), engine.weight_bits, group, dtype.itemsize, model.prequantized)


def stored(weights: WeightPlan) -> list[dict[str, Any]]:
    """The tensors by the form in which they would be kept, with their number and bytes."""
    forms: dict[str, dict[str, Any]] = {}
    for tensor in weights.all_tensors:
        width = 32 if tensor.spec.wide else 8 * tensor.element_bytes
        form = f"{tensor.bits} bits in groups of {tensor.group}" if tensor.quantized else f"{width}-bit floats"
        form = "MXFP4" if tensor.floats else form
        entry = forms.setdefault(form, {"form": form, "tensors": 0, "bytes": 0, "roles": []})
        entry["tensors"] += 1
        entry["bytes"] += tensor.num_bytes
        role = re.sub(r"^(experts|sinks)\.\d+", r"\1", tensor.spec.role.removesuffix(".weight"))
        if role not in entry["roles"]:
            entry["roles"].append(role)
    return list(forms.values())


def plan_line(plan: EnginePlan) -> str:
    from flexbatch.planner.engine_plan import described

    placed = ", ".join(
        f"{share:.0f} % {tier}" for tier, share in plan.weight_plan.realized_percent.items() if share >= 0.5
    )
    rate = ""
    if plan.plan is not None:
        speed, limit = plan.plan.predicted_tokens_per_second, plan.plan.limiting_resource
        rate = f"; {speed:.4g} tok/s predicted, limited by {limit}"
    return (
        f"{plan.device} in {str(plan.dtype).removeprefix('torch.')}: weights {placed}; {described(plan.policy)}{rate}"
    )


def text_of(found: Mapping[str, Any]) -> str:
    """A line for each matter."""
    tokenizer = found["tokenizer"]
    lines = {"model": f"{found['model']}" + (f" ({found['path']})" if found["path"] else "")}
    lines["format"] = found["format"]
    if found["path"]:
        types = ", ".join(f"{count} {kind}" for kind, count in found["tensor_types"].items())
        lines["files"] = f"{len(found['files'])}, {size_text(found['bytes'])}; tensors: {types}"
    lines["family"] = f"{found['family']}, {found['parameters'] / 1e6:,.1f} million parameters"
    experts = found["experts"]
    dense = "" if experts and experts["layers"] == found["layers"] else f"MLP {found['intermediate_size']}, "
    lines["sizes"] = (
        f"{found['layers']} layers of {found['hidden_size']}, {dense}{found['heads']} heads "
        f"and {found['kv_heads']} of keys and values of {found['head_dim']}, {found['vocab_size']:,} tokens"
    )
    if experts:
        shared = f", beside a shared MLP of {experts['shared_width']}" if experts["shared_width"] else ""
        lines["experts"] = (
            f"{experts['chosen']} of {experts['count']} of width {experts['width']} in {experts['layers']} layers"
            f"{shared}; a token goes through {experts['active_parameters'] / 1e6:,.1f} million parameters"
        )
    window = f", window {found['window']}" if found["window"] else ""
    lines["context"] = f"{found['context']:,} tokens ({found['positions']}{window})"
    lines["stops at"] = ", ".join(map(str, found["stop_tokens"])) or "no token"
    if "error" in tokenizer:
        lines["tokenizer"] = f"none: {tokenizer['error']}"
    else:
        special = ", ".join(f"{name} {token!r}" for name, token in tokenizer["special"].items())
        lines["tokenizer"] = f"{tokenizer['kind']}, {tokenizer['tokens']:,} tokens; {special or 'no special tokens'}"
        template = tokenizer["chat_template"]
        size = f"{len(template):,} characters" if isinstance(template, str) else f"{len(template or ())} by name"
        lines["chat template"] = size if template else "none: prompts are text, no chats"
    lines["stored as"] = "; ".join(
        f"{entry['form']}: {entry['tensors']} tensors, {size_text(entry['bytes'])} ({', '.join(entry['roles'])})"
        for entry in found["stored"]
    )
    if found["codes"]:
        lines["codes"] = found["codes"]
    lines["plan"] = found["plan"] or shortened(found["plan_error"])
    return "\n".join(f"{name + ':':<15}{value}" for name, value in lines.items())


def shortened(error: str) -> str:
    """The first line of an error with a table, and its last, which says what to do."""
    first, *rest = error.splitlines()
    return f"none: {first}" + (f"; {rest[-1]}" if rest else "")


def command(args: argparse.Namespace, environ: Mapping[str, str], data: TextIO) -> int:
    config, engine = read_settings([InspectConfig, EngineConfig], args, environ, args.config)
    if args.name is not None:
        if getattr(args, "model", args.name) != args.name:
            raise ConfigurationError(f"MODEL {args.name} and --model {args.model} differ; leave one out")
        engine = dataclasses.replace(engine, model=args.name)
    check_engine(engine)
    found = inspect(engine)
    print(json.dumps(found, indent=2, ensure_ascii=False) if config.json else text_of(found), file=data)
    return DONE if found.get("fits", True) else DOES_NOT_FIT


def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    set_up_logging("WARNING", arguments)
    return run_command(lambda data: command(args, os.environ, data))


if __name__ == "__main__":
    sys.exit(run_process(main))
