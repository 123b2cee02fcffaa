"""What Triton's interpreter lets pass and its compiler does not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import flexbatch.kernels

FILES = sorted(Path(flexbatch.kernels.__path__[0]).glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_kernel_returns_out_of_a_branch(path):
    """The compiler goes on with the lines after a branch that returned, with types that only the other branch has."""
    early = [
        f"{function.name}:{inner.lineno}"
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in function.decorator_list)
        for branch in ast.walk(function)
        if isinstance(branch, ast.If)
        for inner in ast.walk(branch)
        if isinstance(inner, ast.Return)
    ]
    assert not early
