"""Code that can be read: few modules at the top, short files, short functions, short lines."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("flexbatch", "policy", "kernels", "apps", "benchmark")
TOP_LEVEL_MODULES, FILE_LINES, FUNCTION_LINES, COLUMNS = 8, 300, 60, 120


def files(*folders: str) -> list[Path]:
    """Each file once, by its real path, not through the links in flexbatch/."""
    return sorted({path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")})


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_top_level_is_small() -> None:
    """Modules of `flexbatch/` itself, beside `__init__` and `__main__`."""
    names = {path.name for path in (ROOT / "flexbatch").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(names) <= TOP_LEVEL_MODULES, f"{sorted(names)}: move what belongs to a package into it"


@pytest.mark.parametrize("path", files(*PRODUCT), ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    """A function's lines are those from its `def` to its end; decorators do not count."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE_LINES, f"{name_of(path)}: split it by meaning"
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    }
    assert not long, f"{name_of(path)}: functions of more than {FUNCTION_LINES} lines: {long}"


def test_lines_fit_a_screen() -> None:
    """Also those that ruff is told to leave as they are."""
    long = [
        f"{name_of(path)}:{number}"
        for path in files(*PRODUCT, "tests")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert not long, f"lines of more than {COLUMNS} columns: {', '.join(long)}"
