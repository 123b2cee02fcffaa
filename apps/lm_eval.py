"""lm-evaluation-harness with FlexBatch as a model: ``python -m flexbatch.apps.lm_eval run --model flexbatch --model_args pretrained=...``

The command is the harness's own (0.4.13, extra ``flexbatch[lm-eval]``) with one model more. Releases that read the entry-point group
``lm_eval.models`` find the model without this command.
"""

from __future__ import annotations

import sys

from flexbatch.cli import run_command

MODEL = "flexbatch.apps.lm_eval_model:FlexBatchLM"


def register() -> None:
    """Makes ``--model flexbatch`` known to the harness; the class is imported when it is asked for."""
    import lm_eval.models  # noqa: F401  (fills the registry with the harness's own models first)
    from lm_eval.api.registry import model_registry

    if "flexbatch" not in model_registry:
        model_registry.register("flexbatch", target=MODEL)


def main() -> int:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError:
        print("lm-evaluation-harness is not installed: pip install 'flexbatch[lm-eval]'", file=sys.stderr)
        return 2
    register()
    return run_command(cli_evaluate)


if __name__ == "__main__":
    sys.exit(main())
