"""lm-evaluation-harness with FlexBatch as a model: ``python -m flexbatch.apps.lm_eval run --model flexbatch
--model_args pretrained=...``

The command is the harness's own (0.4.13, extra ``flexbatch[lm-eval]``) with one model more. A harness that reads
the entry-point group ``lm_eval.models`` finds the model without this command: no release up to 0.4.13 does.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
from importlib import import_module
from typing import TextIO

from flexbatch.cli.command import run_command
from flexbatch.policy.command_line import command_name
from flexbatch.policy.stdout import run_process
from flexbatch.validation.errors import DONE, USAGE

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


def help_text() -> str:
    name = command_name("flexbatch lm-eval")
    return f"""usage: {name} run --model flexbatch --model_args SETTINGS --tasks TASKS [flags]

The command of lm-evaluation-harness with FlexBatch as a model, all requests of a task in one block. Settings are
those of flexbatch run, as pretrained=MODEL,gpu_memory=16GiB,weight_bits=4; docs/evaluation.md has more.

  run           run tasks; {name} run --help shows the harness's flags
  ls tasks      list tasks
  validate      check tasks of your own

examples:
  {name} run --model flexbatch --model_args pretrained=demo --tasks hellaswag --limit 20"""


def main() -> int:
    if sys.argv[1:] in (["-h"], ["--help"], ["--help-all"]):  # the harness takes ten seconds to import
        print(help_text())
        return DONE
    return run_command(command)


if __name__ == "__main__":
    sys.exit(run_process(main))
