"""Serve clients of the OpenAI API: files and batches, completions and chats, in one block.

    flexbatch serve --model M --state-dir DIR --api-key-file KEYS

Interactive requests go first, and batches fill the block. A server that is started again on its folder goes on with
every batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexbatch.apps.serve.keys import Keys
from flexbatch.apps.serve.listening import listening
from flexbatch.apps.serve.settings import ServeConfig
from flexbatch.cli.command import run_command, set_up_logging
from flexbatch.cli.early_checks import check_engine
from flexbatch.cli.hangup import hung_up
from flexbatch.cli.help import CommandParser
from flexbatch.cli.settings import add_arguments, add_engine_arguments, read_settings, refuse_measurements
from flexbatch.config import EngineConfig
from flexbatch.validation.errors import DONE, INTERRUPTED, ConfigurationError

logger = logging.getLogger("flexbatch")

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "flexbatch serve",
        description="Serve clients of the OpenAI API (files, batches, completions, chats) in one block. Started again "
        "on its folder, it goes on with every batch.",
        first="model host port state_dir api_key_file gpu_memory cpu_memory weight_bits draft config",
        texts={
            "host": "address to listen at (default: 127.0.0.1)",
            "port": "port to listen at (default: 8000)",
            "state_dir": "folder of files and batches",
            "api_key_file": "keys that clients may have, one a line",
        },
        examples="""
            flexbatch serve --model smollm2 --state-dir state
            flexbatch serve --model M --host 0.0.0.0 --api-key-file keys.txt
            """,
    )
    add_arguments(parser, ServeConfig, "server")
    add_engine_arguments(parser)
    return parser


def command(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    config, engine = read_settings([ServeConfig, EngineConfig], args, environ, getattr(args, "config", None))
    refuse_measurements(engine)
    if engine.data_parallel_size > 1:
        raise ConfigurationError(
            f"--data-parallel-size {engine.data_parallel_size}: a server looks at its sequences after every pass, "
            "which it can in one engine: start a server for each GPU behind a proxy, or use --tensor-parallel-size"
        )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"flexbatch serve needs {', '.join(missing)}: pip install 'flexbatch[serve]'")
    keys = None if config.api_key_file is None else Keys.read(config.api_key_file)
    check_engine(engine)
    if keys is None and not config.is_local:
        logger.warning("everybody who can connect to %s may ask: --api-key-file FILE names keys", config.host)
    with listening(config) as bound:
        from flexbatch.apps.serve.state import ServerState

        state = ServerState(Path(config.state_dir).expanduser().absolute())
        try:
            from flexbatch.apps.batch import model_identity
            from flexbatch.apps.serve.process import serve

            serve(config, engine, state, bound, keys, model_identity)
        except KeyboardInterrupt:
            logger.info("stopped while it started")
        finally:
            state.close()
    return INTERRUPTED if hung_up() else DONE


def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    set_up_logging(words=arguments)
    return run_command(lambda data: command(args, os.environ))
