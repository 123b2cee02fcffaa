"""What Triton's interpreter lets pass and its compiler does not."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flexbatch.kernels
from flexbatch.kernels.attention_tiles import TABLES

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


def test_kernels_are_not_compiled_for_where_a_pass_cuts_its_tables():
    """Those of prompts start behind 33 sequences that decode, or 40: each alignment was a kernel of its own, compiled
    in the middle of a job."""
    kernels = [
        function
        for path in FILES
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in function.decorator_list)
        if function.name.endswith("_kernel") and TABLES[0] in [argument.arg for argument in function.args.args]
    ]
    assert len(kernels) == 4
    assert not [each.name for each in kernels if "*TABLES" not in ast.unparse(each.decorator_list[-1])]


def test_no_product_with_codes_runs_on_while_the_next_ones_are_expanded():
    """The registers that tensor cores read are written again in the next step, and the compiler does not wait: at 8
    bits it wrote into those of products that ran."""
    command = [sys.executable, "-m", "tests.kernels.hopper_forms"]
    compiled = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, stdout=subprocess.PIPE, check=True)
    for form in json.loads(compiled.stdout):
        loop = form[form.index("scf.for") : form.rindex("scf.yield")]
        assert "warp_group_dot" in loop, "products are those of tensor cores, with codes in registers"
        assert set(re.findall(r"pendings = (\d+)", loop)) == {"0"}
