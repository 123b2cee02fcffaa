"""The life of a server's process: what is opened in which order, signals, and the end."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from flexbatch.apps.jobs.manifest import FORMAT, differences
from flexbatch.apps.serve.answers import Answers, Names
from flexbatch.apps.serve.app import Parts, make_app
from flexbatch.apps.serve.batches import Batches
from flexbatch.apps.serve.keys import Keys
from flexbatch.apps.serve.monitoring import Monitoring
from flexbatch.apps.serve.runs import Served
from flexbatch.apps.serve.serving import GRACE_SECONDS, Serving
from flexbatch.apps.serve.settings import ServeConfig
from flexbatch.apps.serve.state import ServerState
from flexbatch.cli.hangup import hangup_signals, note
from flexbatch.cli.run_settings import SamplingConfig
from flexbatch.config import EngineConfig
from flexbatch.models.generation_config import generation_of
from flexbatch.models.lora.request import parse_loras
from flexbatch.request import SAMPLING_RULES
from flexbatch.validation.errors import ConfigurationError

logger = logging.getLogger("flexbatch")

STOP_SECONDS = 10.0
"""What batches have finished is on the disk within this time."""


def names_of(config: ServeConfig, engine: EngineConfig) -> Names:
    """A model that lies in a folder has the folder's name: clients need not know where. Raises ConfigurationError where
    an adapter is called so, too."""
    name = config.served_model_name
    if name is None:
        path = Path(engine.model).expanduser()
        name = path.resolve().name if path.exists() else engine.model
    names = Names(name, tuple(request.name for request in parse_loras(engine.lora)))
    if name in names.adapters:
        raise ConfigurationError(
            f"--lora {name}=...: requests could not tell the adapter from the model, which is called {name!r}, too; "
            "give one of them another name (--served-model-name)"
        )
    return names


def check_unfinished(state: ServerState, identity: dict[str, Any]) -> None:
    """Raises ConfigurationError where batches wait that were begun with another model or other settings: they would go
    on with answers of another kind."""
    before, waiting = state.setting("identity"), state.unfinished_batches()
    changes = list(differences(before, identity)) if before is not None else []
    if changes and waiting:
        listing = "\n  ".join(changes[:20])
        raise ConfigurationError(
            f"--state-dir {state.folder} holds {len(waiting)} batches that have not ended, of a server with other "
            f"settings:\n  {listing}\nStart with those settings until they have ended or are cancelled, or name "
            "another folder"
        )
    if before != identity:
        state.set_setting("identity", identity)


class Signals:
    """SIGINT, SIGTERM and SIGHUP end the server: answers on their way have a moment, a pass that takes longer is broken
    off, and a second signal does so at once; not what comes with the end of one session (`flexbatch.cli.hangup`)."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._stopped = self._in_passes = self._hung_up = False
        self._before: dict[int, Any] = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._hung_up = True
            note(self._before.get(number))
        if number == signal.SIGALRM:
            if self._in_passes:
                raise KeyboardInterrupt
        elif self._stopped:
            if number == signal.SIGINT or not self._hung_up:
                raise KeyboardInterrupt
        else:
            self._stopped = True
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
            self._stop()

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """The body is broken off where it takes too long after the first signal. What follows is not: batches write
        what they have, however long a busy machine takes for it."""
        with contextlib.suppress(KeyboardInterrupt):
            self._in_passes = True
            try:
                yield
            finally:
                self._in_passes = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, *hangup_signals()):
            self._before[number] = signal.signal(number, self.handle)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in self._before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def answering(app: Any, bound: socket.socket, on_end: Callable[[], None]) -> Iterator[None]:
    """HTTP in a thread of its own: signals are the main thread's. on_end: called when it ends by itself."""
    import uvicorn

    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = uvicorn.Server(settings)

    def run() -> None:
        try:
            server.run(sockets=[bound])
        finally:
            on_end()

    thread = threading.Thread(target=run, name="http", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(GRACE_SECONDS + 1)


def serve(
    config: ServeConfig,
    engine: EngineConfig,
    state: ServerState,
    bound: socket.socket,
    keys: Keys | None,
    identity: Any,
) -> None:
    """Runs a server until a signal. ``identity``: what answers depend on, of an EngineConfig."""
    from flexbatch.engine import LLM

    names, found = names_of(config, engine), identity(engine)
    precision = {
        name: getattr(engine, name) for name in ("dtype", "weight_bits", "cache_bits", "seed", "generation_config")
    }
    versions = {"sampling": SAMPLING_RULES, "output folder": FORMAT}
    check_unfinished(state, {"model": {**found, **precision}, "names": list(names.all), "versions": versions})
    state.sweep()
    with LLM.from_config(engine) as llm:
        assert llm.weights is not None  # on their tiers before anybody is served
        serving = Serving(llm)
        signals = Signals(serving.stop)
        with signals.installed():
            defaults = SamplingConfig().api_params(generation_of(engine))
            answers = Answers(serving, defaults, names, config.max_waiting)
            batches = Batches(
                state,
                Served(serving, engine, found, names.all, config.max_request_bytes),
                config.max_batches,
                config.active_batches,
            )
            monitoring = Monitoring(serving, answers, batches)
            app = make_app(Parts(config, state, serving, answers, batches, monitoring, keys))
            host, port = bound.getsockname()[:2]
            try:
                batches.start()
                with answering(app, bound, serving.stop):
                    logger.info("serving %s at http://%s:%s", names.model, f"[{host}]" if ":" in host else host, port)
                    with signals.passes():
                        serving.run()
            finally:
                answers.close()
                batches.stop(STOP_SECONDS)
    logger.info("stopped; batches that have not ended go on with the next start")
