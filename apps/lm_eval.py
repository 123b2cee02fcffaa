"""lm-evaluation-harness with FlexBatch as a model: ``python -m flexbatch.apps.lm_eval run --model flexbatch
--model_args pretrained=...``

The command is the harness's own (0.4.13, extra ``flexbatch[lm-eval]``) with one model more. Releases that read the
entry-point group ``lm_eval.models`` find the model without this command.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
from importlib import import_module
from typing import TextIO

from flexbatch.cli.command import run_command
from flexbatch.policy.stdout import run_process
from flexbatch.validation.errors import USAGE

MODEL = "flexbatch.apps.lm_eval_model:FlexBatchLM"


def register() -> None:
    """Makes ``--model flexbatch`` known to the harness; the class is imported when it is asked for."""
    import lm_eval.models  # noqa: F401  (fills the registry with the harness's own models first)
    from lm_eval.api.registry import model_registry

    if "flexbatch" not in model_registry:
        model_registry.register("flexbatch", target=MODEL)


def print_to(data: TextIO) -> None:
    """Sends what the modules of the harness's command line print, its results and lists, to ``data``; what the rest
    of it prints is not data."""
    import lm_eval._cli as commands

    for module in pkgutil.iter_modules(commands.__path__, f"{commands.__name__}."):
        import_module(module.name).print = functools.partial(print, file=data)  # type: ignore[attr-defined]


def command(data: TextIO) -> int | None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError:
        print("lm-evaluation-harness is not installed: pip install 'flexbatch[lm-eval]'", file=sys.stderr)
        return USAGE
    register()
    print_to(data)
    return cli_evaluate()


def main() -> int:
    return run_command(command)


if __name__ == "__main__":
    sys.exit(run_process(main))
