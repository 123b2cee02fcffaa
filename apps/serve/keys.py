"""Who may ask: the keys of --api-key-file."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from flexbatch.validation.errors import ConfigurationError


class Keys:
    """The keys that clients may have. A key is compared by its digest, in a time that does not depend on it."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: str) -> Keys:
        """Raises ConfigurationError for a file without keys."""
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigurationError(f"--api-key-file {path}: {reason}") from None
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise ConfigurationError(f"--api-key-file {path} holds no key: write one a line")
        return cls(keys)

    def allow(self, header: str) -> bool:
        """Whether an Authorization header names one of the keys."""
        scheme, _, key = header.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogatepass")).digest()
        found = False
        for known in self._digests:  # all of them, whichever it is
            found |= hmac.compare_digest(digest, known)
        return found and scheme.lower() == "bearer"
