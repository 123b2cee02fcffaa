"""Modules that a child which only lists kernels does without: what it asks of them is answered here.

Tensors without memory import them at their first use. torch's compiler is only told that it leaves functions alone,
which took 1.2 of 3.4 s of a listing. Another one knows sizes that are symbols, and brings 470 modules of algebra: of
sizes that are numbers it is asked for nothing but the numbers. A machine whose disk had not been read imported them for
6.7 s, and its profile waited for that; where no bytecode is kept they take 3.6 s of a 2-core Xeon, else 0.3.
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

Answers = Mapping[str, Callable[..., Any]]
"""By name."""


class Symbol:
    """Of which there are none."""


def unchanged(fn: Any = None, recursive: bool = True, **named: Any) -> Any:
    """For `torch._dynamo.disable`."""
    return fn if fn is not None else lambda fn: fn


def the_same(x: Any) -> Any:
    return x


def all_of(*conditions: Any) -> Any:
    return functools.reduce(operator.and_, conditions)


def any_of(*conditions: Any) -> Any:
    return functools.reduce(operator.or_, conditions)


def equal(x: Any, y: Any) -> bool:
    if isinstance(x, tuple | list) and isinstance(y, tuple | list):
        return len(x) == len(y) and all(map(equal, x, y))
    return bool(x == y)


OF_NUMBERS: Answers = {
    **dict.fromkeys(("guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true"), bool),
    **dict.fromkeys(("guard_int", "guard_scalar", "guarding_hint_or_throw"), the_same),
    "expect_true": lambda condition, skip=0: bool(condition),
    "has_guarding_hint": lambda x: True,
    "is_nested_int": lambda x: False,
    "sym_and": all_of,
    "sym_or": any_of,
    "sym_eq": equal,
}
"""What is asked of a size, or of a comparison of sizes."""
DYNAMO, ALGEBRA = "torch._dynamo", "sympy"
LEFT_OUT: Mapping[str, Answers] = {
    DYNAMO: {"disable": unchanged},
    "torch.fx.experimental.symbolic_shapes": OF_NUMBERS,
    ALGEBRA: {"Basic": Symbol},
}


class NotImported(ModuleType):
    """In the place of a module. Whatever it is asked for that is not among its answers is the module's, which is
    imported then."""

    def __init__(self, name: str, answers: Answers, package: bool = False) -> None:
        """package: others are imported from it."""
        super().__init__(name)
        vars(self).update(answers)
        self._asked_for = {"__path__"} if package else set()

    def __getattr__(self, name: str) -> Any:
        # Such names are asked for by who looks at all modules, as `inspect` does, and by every `from` this `import`.
        if name.startswith("__") and name not in self._asked_for:
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def leave_out() -> None:
    """Of this process. Modules that are there already stay."""
    for name, answers in LEFT_OUT.items():
        if name not in sys.modules:
            sys.modules[name] = module = NotImported(name, answers, package=name in (DYNAMO, ALGEBRA))
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(importlib.import_module(parent), own, module)
