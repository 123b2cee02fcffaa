"""Settings files from editors that write a byte order mark, or another encoding than UTF-8."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexbatch.cli.settings import _read_yaml
from flexbatch.validation.errors import ConfigurationError

TEXT = "max_tokens: 6\nprompt_template: 'größer {text}'\n"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path, form: str, end: str) -> None:
    (tmp_path / "c.yaml").write_bytes(TEXT.replace("\n", end).encode(form))
    assert _read_yaml(str(tmp_path / "c.yaml")) == {"max_tokens": 6, "prompt_template": "größer {text}"}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (TEXT.encode("utf-16"), "is UTF-16, .* iconv"),
        (TEXT.encode("latin-1"), "is not UTF-8 text"),
        (b"a: [", "cannot be read as YAML"),
        (b"[" * 400, "cannot be read as YAML"),
        (b"a: \x00", "cannot be read as YAML"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(ConfigurationError, match=rf"c\.yaml.*{told}"):
        _read_yaml(str(tmp_path / "c.yaml"))
