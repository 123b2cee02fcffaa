"""How a command begins and ends: logging, interruptions, exit codes."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TextIO

from flexbatch.cli.colors import LogFormatter, has_colors
from flexbatch.cli.hangup import HangUp, hangup_signals
from flexbatch.cli.settings import logger
from flexbatch.policy.command_line import typed_words
from flexbatch.policy.stdout import READER_GONE, data_apart
from flexbatch.validation.errors import (
    CRASH,
    DOES_NOT_FIT,
    DONE,
    HUNG_UP,
    INTERRUPTED,
    USAGE,
    CheckpointError,
    ConfigurationError,
    DoesNotFitError,
    LostRankError,
    told,
)
from flexbatch.validation.secrets import redact_logs, redacted_word, secrets_of


def set_up_logging(level: str = "INFO", words: Sequence[str] | None = None) -> None:
    """Log lines of this package from `level` on, and warnings of libraries, to stderr: stdout is for data only.

    No line shows credentials of URIs, nor those among the ``words`` of the command in any spelling. Libraries say at
    level INFO what concerns no user of a command: every request over HTTP, every version that was found.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(LogFormatter(has_colors(sys.stderr)))
    logger.setLevel(level.upper())
    redact_logs(secrets_of(sys.argv if words is None else words))


def resume_command(command: Sequence[str]) -> str:
    """The command line that goes on: the same one, as somebody types it, without what would discard the output, and
    without credentials."""
    return shlex.join(
        redacted_word(word) for word in typed_words(command) if word not in ("--overwrite", "--overwrite=true")
    )


def run_command(main: Callable[[TextIO], int | None], resume: str | None = None) -> int:
    """Runs a command and maps how it ended to the exit code. `main` returns 0, 3 for row errors, or None for 0.

    `main` gets the stream for data; whatever else is printed to stdout meanwhile goes to stderr. `resume`: the
    command line that goes on after an interruption. SIGTERM and SIGHUP end the command as Ctrl-C does, so that it can
    put things in order.
    """
    hang_up = HangUp()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, *hangup_signals()):
            signal.signal(number, hang_up)
            # Forked helpers, such as the pool in which lm_eval computes errors, have nothing to put in order: ended,
            # they would print a traceback.
            os.register_at_fork(after_in_child=partial(signal.signal, number, signal.SIG_DFL))
    try:
        with data_apart() as data:
            code = main(data) or DONE
    except KeyboardInterrupt:
        logger.error("interrupted%s", f"; resume with: {resume}" if resume else "")
        code = INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout has gone: nobody is there to be told.
        return READER_GONE
    except Exception as error:
        code = exit_code(error)
        # Of a rank that is lost, its own traceback is the one to read.
        if code == CRASH and not isinstance(error, LostRankError):
            logger.exception("crashed: %s", told(error))
        else:
            logger.error("%s", told(error))
        return code
    return HUNG_UP if code == INTERRUPTED and hang_up.came else code


def exit_code(error: BaseException) -> int:
    """2 for what the user can set right, 4 for what does not fit, 1 for the rest."""
    if isinstance(error, (ConfigurationError, CheckpointError)):
        return USAGE
    if isinstance(error, DoesNotFitError) or type(error).__name__ == "OutOfMemoryError":
        return DOES_NOT_FIT
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DOES_NOT_FIT
        if error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOENT,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.EEXIST,
        ):
            return USAGE
    return CRASH
