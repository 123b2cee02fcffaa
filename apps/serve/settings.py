"""Settings of the server. The command line, the environment and the YAML file are derived from the fields."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from flexbatch.config import option, parse_bytes
from flexbatch.validation.errors import ConfigurationError


@dataclass(frozen=True)
class ServeConfig:
    """Where the server listens, what it keeps, and how much it takes. Raises ConfigurationError that names the
    setting."""

    host: str = option("127.0.0.1", "address to listen at; others than this machine need 0.0.0.0 or ::, say")
    port: int = option(8000, "port to listen at; 0 takes a free one, which the log tells")
    state_dir: str = option("flexbatch-state", "folder of files, batches and their progress; one server at a time")
    api_key_file: str | None = option(
        None, "file of the keys that clients may have, one a line (default: everybody who can connect may ask)"
    )
    served_model_name: str | None = option(
        None, "name of the model for clients (default: its Hub id, or the name of its folder)"
    )
    max_request_size: str | int = option("16MiB", "largest request, other than a file that is uploaded", metavar="SIZE")
    max_file_size: str | int = option("16GiB", "largest file that is uploaded", metavar="SIZE")
    max_waiting: int = option(1024, "answers that interactive requests wait for at one time; more get status 429")
    max_batches: int = option(1000, "batches that have not ended; more get status 429")
    active_batches: int = option(4, "batches of which lines are read at one time; the oldest fills the block first")
    client_timeout: float = option(60.0, "seconds that a client may take to send or read the next part of a message")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigurationError(f"port={self.port} must be from 0 to 65535")
        for name in ("max_waiting", "max_batches", "active_batches"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.client_timeout < 1e6:
            raise ConfigurationError(f"client_timeout={self.client_timeout:g} must be above 0 and below 1e6 seconds")
        for name in ("state_dir", "host"):
            if not getattr(self, name):
                raise ConfigurationError(f"{name} is empty")
        for name in ("max_request_size", "max_file_size"):
            try:
                parse_bytes(getattr(self, name))
            except ConfigurationError as error:
                raise ConfigurationError(f"{name}: {error}") from None

    @property
    def max_request_bytes(self) -> int:
        return parse_bytes(self.max_request_size)

    @property
    def max_file_bytes(self) -> int:
        return parse_bytes(self.max_file_size)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
