"""Text from outside: byte order marks, encodings, ends of lines, and JSON that is read strictly.

Lines end with ``\\n`` or ``\\r\\n`` and nothing else: U+2028, U+2029, U+0085 and a lone ``\\r`` are characters of a
line, though `str.splitlines` cuts there.
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from flexbatch.validation.checks import short
from flexbatch.validation.errors import ConfigurationError

MARK = "\ufeff"
UTF8_MARK = MARK.encode()
OTHER_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
"""What text in other encodings begins with; the longer ones first, as UTF-32 begins like UTF-16."""
DEEPEST = 200
"""Levels of lists and objects in a JSON value. Whatever walks a value recursively is safe below this on every
Python, and no request needs so many."""
LONGEST_INT = 4000
"""Digits up to which a whole number becomes an int: Python refuses to print, or to read, more than 4,300."""


def without_mark(data: bytes, name: object) -> bytes:
    """The beginning of a text file without its byte order mark. Raises ConfigurationError that names the encoding
    where it is not UTF-8.
    """
    for mark, encoding in OTHER_MARKS:
        if data.startswith(mark):
            raise ConfigurationError(
                f"{name} is {encoding}, as its byte order mark says, and only UTF-8 is read: convert it with iconv "
                f"-f {encoding} -t UTF-8 OLD > NEW"
            )
    return data.removeprefix(UTF8_MARK)


def decode_text(data: bytes, name: object) -> str:
    """A whole text file. Raises ConfigurationError that names the file and the first byte that is not UTF-8."""
    data = without_mark(data, name)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(
            f"{name}: is not UTF-8 text: {error.reason} at byte {error.start}, in line {line}"
        ) from None


def read_text(path: str | Path) -> str:
    """The text of a file, its ends of lines as they are. Raises OSError, and ConfigurationError as `decode_text`."""
    return decode_text(Path(path).read_bytes(), path)


def split_lines(text: str) -> list[str]:
    """The lines of a text without their ends; the end of the last one may be missing."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def parse_json(text: str | bytes, *, exact: bool = False, constants: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError with a reason, whatever is wrong with it.

    Refused too: a key that stands twice in one object, of which every parser would drop another, more than `DEEPEST`
    levels, and NaN and Infinity
    unless ``constants`` allows them. With ``exact`` a number with a point or an exponent is a Decimal, so that no digit
    of it is lost.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    constant = float if constants else _refuse_constant
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=Decimal if exact else float,
            parse_constant=constant,
        )
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        location = f"character {error.pos}" if error.lineno == 1 else f"line {error.lineno}, character {error.colno}"
        raise ValueError(f"not JSON: {error.msg} at {location}") from None
    except ArithmeticError:
        raise ValueError("not JSON that can be read: the exponent of a number is too large") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {short(next(key for key in keys if keys.count(key) > 1))} stands twice in one object"
        )
    return found


def _whole(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= LONGEST_INT else Decimal(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: it has no {name}")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise _too_deep()
        level = [
            item
            for parent in level
            if isinstance(parent, dict | list)
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        depth += 1


def _too_deep() -> ValueError:
    return ValueError(f"not JSON that can be read: more than {DEEPEST} levels of lists and objects")


def json_text(value: Any) -> str:
    """JSON of a value, Unicode whatever its texts hold: half of a surrogate pair is escaped. Numbers may be Decimals,
    which are written digit by digit as they were. What JSON does not have, such as a date, is its text.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json_text(str(key))}: {json_text(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(json_text, value)) + "]"
        return str(value) if isinstance(value, Decimal) else json_text(str(value))
    return text if lone_surrogate(text) < 0 else json.dumps(value)


def with_doubles(value: Any, *, exact: bool = False) -> Any:
    """The value with doubles for Decimals, which nobody who walks a parsed JSON value expects; with ``exact``, only
    where a double is written with the same digits.
    """
    if isinstance(value, dict):
        return {name: with_doubles(content, exact=exact) for name, content in value.items()}
    if isinstance(value, list):
        return [with_doubles(content, exact=exact) for content in value]
    if isinstance(value, Decimal):
        return value if exact and repr(float(value)) != str(value) else float(value)
    return value


def lone_surrogate(text: str) -> int:
    """Where the first half of a surrogate pair without its other half stands; -1 where there is none. Such a text
    has no UTF-8 form.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return -1
