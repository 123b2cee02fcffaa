"""The socket of a server, opened before anything is imported that takes seconds: a wrong host is told at once."""

from __future__ import annotations

import socket

from flexbatch.apps.serve.settings import ServeConfig
from flexbatch.validation.errors import ConfigurationError


def listening(config: ServeConfig) -> socket.socket:
    """A socket at the address, before anything is loaded. Raises ConfigurationError."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen at --host {config.host} --port {config.port}: {error.strerror}; choose others"
        ) from None
    return made
