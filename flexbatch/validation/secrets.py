"""Credentials in URIs (``s3://KEY:SECRET@bucket``, ``?sig=...``): shown nowhere, be it a message, a log line, a
traceback or a file of the job."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from urllib.parse import quote, quote_plus, unquote, unquote_plus

HIDDEN = "***"
HARMLESS = frozenset(
    {
        "allow_bucket_creation",
        "allow_bucket_deletion",
        "allow_delayed_open",
        "anonymous",
        "background_writes",
        "blob_storage_scheme",
        "check_directory_existence_before_creation",
        "connect_timeout",
        "default_metadata",
        "dfs_storage_scheme",
        "enable_tls",
        "endpoint_override",
        "force_virtual_addressing",
        "location",
        "project_id",
        "region",
        "request_timeout",
        "retry_limit_seconds",
        "scheme",
        "tls_ca_dir_path",
        "tls_ca_file_path",
        "tls_verify_certificates",
        "version",
        "versionId",
    }
)
"""Options of file systems that are shown with their values. There is no telling what a file system calls its
secrets, so all others are hidden."""
URI = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+")
USER = re.compile(r"(?<=://)(?:(?!anonymous@)(?P<name>[^/@:?#]*)(?::(?!\d+(?:[/?#]|$))(?P<password>[^@]*))?)@")
"""User and password in front of a host. A password may hold slashes, as AWS keys do; what follows the colon is no
password where it is a port."""
OPTION = re.compile(r"(?P<start>[?&;#])(?P<name>[\w.%-]+)=(?P<value>[^&;#]*)")
CONTAINER = ("abfs://", "abfss://", "wasb://", "wasbs://")
"""In these a name without a password is that of a container: ``abfss://container@account.dfs.core.windows.net``."""
SHORTEST, SHORTEST_NAME = 4, 12
"""Characters of a secret that is hidden wherever it stands; and of a user's name, for a short one may be any word."""


def hide_uri(uri: str) -> str:
    """One URI without its credentials."""

    def user(match: re.Match[str]) -> str:
        return match[0] if match["password"] is None and uri.startswith(CONTAINER) else f"{HIDDEN}@"

    def option(match: re.Match[str]) -> str:
        plain = match["name"] in HARMLESS and "@" not in unquote(match["value"])
        return match[0] if plain or not match["value"] else f"{match['start']}{match['name']}={HIDDEN}"

    return OPTION.sub(option, USER.sub(user, uri, count=1))


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """A text without the credentials of the URIs in it, and without ``secrets``."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return URI.sub(lambda match: hide_uri(match[0]), text) if "://" in text else text


def redacted_word(word: str) -> str:
    """A word of a command line, in which a URI may hold spaces and quotes."""
    return hide_uri(word) if "://" in word else word


def secrets_of(words: Iterable[str]) -> tuple[str, ...]:
    """Every credential in the URIs among the words of a command, in the spellings that libraries may show: as given,
    decoded, encoded; longest first.
    """
    found: set[str] = set()
    for word in words:
        if "://" not in word:
            continue
        user = USER.search(word)
        if user is not None and not (user["password"] is None and word.startswith(CONTAINER)):
            name, password = user["name"], user["password"] or ""
            found |= {value for value in _spellings(name) if len(value) >= SHORTEST_NAME} | _spellings(password)
        for option in OPTION.finditer(word):
            if option["name"] not in HARMLESS:
                found |= _spellings(option["value"])
    return tuple(sorted((value for value in found if len(value) >= SHORTEST), key=lambda value: (-len(value), value)))


def _spellings(value: str) -> set[str]:
    decoded = {unquote(value), unquote_plus(value)}
    return {
        value,
        *decoded,
        *(encode(plain, safe=safe) for plain in decoded for encode in (quote, quote_plus) for safe in ("", "/")),
    }


class _Redacting(logging.Formatter):
    """Another formatter's lines, tracebacks included, without credentials."""

    def __init__(self, inner: logging.Formatter, secrets: tuple[str, ...]) -> None:
        super().__init__()
        self._inner, self._secrets = inner, secrets

    def format(self, record: logging.LogRecord) -> str:
        return redacted(self._inner.format(record), self._secrets)


def redact_logs(secrets: tuple[str, ...]) -> None:
    """From now on no log line of this process shows these, nor the credentials of any URI."""
    for handler in logging.getLogger().handlers:
        inner = handler.formatter or logging.Formatter()
        handler.setFormatter(_Redacting(inner._inner if isinstance(inner, _Redacting) else inner, secrets))
