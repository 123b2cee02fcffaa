"""Checks of single values by type and range: each returns the value in its plain Python type, or says what is wanted
instead."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

from flexbatch.policy.suggest import nearest
from flexbatch.validation.errors import ConfigurationError

Check = Callable[[Any], Any]
"""Gives the value that is kept, or raises Unfit."""


class Unfit(ValueError):
    """A value that a field cannot take; the message completes "must be ...", ``part_name`` names the part of it that is
    wrong."""

    def __init__(self, wanted: str, part_name: str = "", part: Any = None) -> None:
        super().__init__(wanted)
        self.part_name, self.part = part_name, part


class UnknownKeywordError(ConfigurationError, TypeError):
    """A keyword that does not exist. A TypeError as well, as Python raises for its own."""


def short(value: Any) -> str:
    """The value as it is written in Python, cut in the middle where it is long: an error is read by people, and what
    stands in a row may be a megabyte, or a number that Python will not print."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = shortened.maxlong = 80
    try:
        return shortened.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too long to show"


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the known one that looks like it, or all of them."""
    known = sorted(known)
    found = nearest(name, known)
    return f"; known are {', '.join(known)}" if found is None else f"; did you mean {found!r}?"


def check_keywords(
    what: str,
    given: Iterable[str],
    known: Collection[str],
    meant: Mapping[str, str] | None = None,
    absent: Mapping[str, str] | None = None,
) -> None:
    """Raises UnknownKeywordError for the first keyword that is not known. ``meant``: known names by what others call
    them. ``absent``: why there is none of a name, and what to do."""
    for name in given:
        if name not in known:
            if name in (absent or {}):
                raise UnknownKeywordError(f"{what} has no keyword {name!r}: {(absent or {})[name]}")
            other = (meant or {}).get(name)
            hint = closest(name, known) if other is None else f"; did you mean {other!r}?"
            raise UnknownKeywordError(f"{what} has no keyword {name!r}{hint}")


def is_one_of(value: Any, values: Iterable[Any]) -> bool:
    """Told apart as Python's types do: 1 is not True."""
    return any(type(value) is type(other) and value == other for other in values)


def whole(low: int | None = None, high: int | None = None) -> Check:
    """A whole number; numpy's will do, bool and 2.0 will not."""

    def check(value: Any) -> int:
        if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise Unfit("a whole number")
        number = int(value)
        if low is not None and number < low:
            raise Unfit(f">= {low}")
        if high is not None and number > high:
            raise Unfit(f"<= {high:,}")
        return number

    return check


def number(fits: Callable[[float], bool], wanted: str) -> Check:
    """A number that fits; bool and text are none."""

    def check(value: Any) -> float:
        if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):
            raise Unfit(f"a number {wanted}")
        try:
            converted = float(value)
        except OverflowError:
            converted = math.inf
        if not fits(converted):
            raise Unfit(wanted)
        return converted

    return check


def truth(value: Any) -> bool:
    """True or False, numpy's too; no other value stands for one."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
        raise Unfit("True or False")
    return bool(value)


def text(most: int) -> Check:
    """Text of 1 to ``most`` characters."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= most:
            raise Unfit(f"text of 1 to {most:,} characters")
        return str(value)

    return check


def optional(check: Check) -> Check:
    """None stays None."""
    return lambda value: None if value is None else check(value)


def several(check: Check, most: int, wanted: str) -> Check:
    """A tuple of values from a list, tuple, set or array; None is none of them."""

    def check_all(value: Any) -> tuple[Any, ...]:
        if value is None:
            return ()
        parts = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(parts, Sequence | Set) or isinstance(parts, str | bytes | bytearray):
            raise Unfit(f"a list of {wanted}")
        if not -1 < size(parts) <= most:
            raise Unfit(f"a list of at most {most:,} {wanted}")
        return tuple(_part(check, part, f"element {number}") for number, part in enumerate(parts))

    return check_all


def size(parts: Sequence[Any] | Set[Any]) -> int:
    """Its length, -1 where Python cannot tell: ranges may be longer than that."""
    try:
        return len(parts)
    except OverflowError:
        return -1


def one_or_several(kind: type, check: Check, most: int, wanted: str) -> Check:
    """The check of `several`, where a single value stands for a list of one."""
    check_all = several(check, most, wanted)
    return lambda value: check_all((value,) if isinstance(value, kind) and not isinstance(value, bool) else value)


def table(key: Check, entry: Check, most: int, wanted: str) -> Check:
    """A dict of its own from a mapping."""

    def check(value: Any) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise Unfit(f"a dict of {wanted}")
        if len(value) > most:
            raise Unfit(f"a dict of at most {most:,} {wanted}, not {len(value):,}")
        return {
            _part(key, name, "a key"): _part(entry, item, f"the value of {short(name)}") for name, item in value.items()
        }

    return check


def _part(check: Check, part: Any, part_name: str) -> Any:
    try:
        return check(part)
    except Unfit as problem:
        raise Unfit(
            str(problem),
            f"{part_name}, {problem.part_name}" if problem.part_name else part_name,
            problem.part if problem.part_name else part,
        ) from None


def checked(what: str, name: str, value: Any, check: Check) -> Any:
    """The value as the check keeps it. Raises ConfigurationError that names the field, what it was given and what is
    wanted."""
    try:
        return check(value)
    except Unfit as problem:
        culprit = f" ({problem.part_name} is {short(problem.part)})" if problem.part_name else ""
        raise ConfigurationError(f"{what} {name}={short(value)}{culprit} must be {problem}") from None
