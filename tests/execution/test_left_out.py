"""What a child that lists kernels does not import answers as the modules do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product

import pytest

from flexbatch.execution.left_out import DYNAMO, LEFT_OUT, OF_NUMBERS, NotImported, equal

LISTING = """
import json, sys
import torch
from flexbatch.calibrate.compiling import launch_calls
from flexbatch.execution.left_out import LEFT_OUT, NotImported, leave_out
from flexbatch.kernels.imagined_gpu import imagined_gpu
from flexbatch.planner.loader import planned_kernels
from tests.execution import launched_kernels as jobs
from flexbatch import LLM

jobs.shapes.config_of = jobs.MODELS.__getitem__
options = {"dummy_weights": True, "device": "cpu", "dtype": "bfloat16", "hardware": "cpu", **jobs.STREAMED}
plans = []
for name in ("grouped", "experts", "biases"):
    with LLM(name, gpu_memory="256MiB", cpu_memory="256MiB", weight_bits=8, **options) as llm:
        llm.prepare([[5, 6, 7]] * 9)
        plans.append(planned_kernels(llm.engine_plan))
before = [name for name in LEFT_OUT if name in sys.modules]
if sys.argv[1] == "leave out":
    leave_out()
with imagined_gpu(jobs.TRAITS) as found:
    launch_calls(torch.bfloat16)
    for plan in plans:
        plan.launch(plan.what)
left = [name for name in LEFT_OUT if isinstance(sys.modules.get(name), NotImported)]
told = sorted(f"{each.name} {each.forms} {each.options}" for each in found)
print(json.dumps({"before": before, "left": left, "launches": told}))
"""


def norms() -> None:
    """Some function."""


def listed(how):
    """In a process in which Triton does not interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    told = subprocess.run([sys.executable, "-c", LISTING, how], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(told.stdout)


def test_a_profile_and_plans_are_listed_the_same_without_them():
    without, whole = listed("leave out"), listed("import")
    assert without["launches"] == whole["launches"] and len(whole["launches"]) > 30
    assert without["left"] == list(LEFT_OUT) and not whole["left"] and not without["before"]


def test_of_numbers_the_same_is_answered():
    from torch.fx.experimental import symbolic_shapes as real

    truths = [True, False]
    for name, answer in OF_NUMBERS.items():
        if not hasattr(real, name):  # of another torch
            continue
        named = getattr(real, name)
        if name == "sym_eq":
            cases = [*product((0, 1, 5), repeat=2), ([1, 2], (1, 2)), ((1, 2), (1, 3)), ((1,), (1, 2)), ([], [])]
        elif name in ("sym_and", "sym_or"):
            cases = [case for count in (1, 2, 3) for case in product(truths, repeat=count)]
        elif name in ("guard_int", "guard_scalar", "guarding_hint_or_throw", "is_nested_int", "has_guarding_hint"):
            cases = [(0,), (1,), (7,)]
        else:
            cases = [(truth,) for truth in truths]
        for case in cases:
            told, right = answer(*case), named(*case)
            assert told == right and type(told) is type(right), (name, case)
    assert equal(((1, 2), 3), [[1, 2], 3])


def test_a_module_that_leaves_functions_alone_is_imported_where_more_is_asked_of_it(tmp_path, monkeypatch):
    """Sums of tensors without memory import torch's own compiler, for a second."""
    folder = tmp_path / "package_of_this_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    # It is asked for what it has before it is whole.
    (folder / "slow.py").write_text("import package_of_this_test as own\nnumber = 5\nassert own.slow.number == 5")
    monkeypatch.syspath_prepend(tmp_path)
    import package_of_this_test

    name = "package_of_this_test.slow"
    monkeypatch.setitem(sys.modules, name, NotImported(name, LEFT_OUT[DYNAMO], package=True))
    package_of_this_test.slow = sys.modules[name]
    from package_of_this_test import slow

    assert slow.disable(norms) is norms and slow.disable(recursive=False)(norms) is norms
    assert not hasattr(slow, "__file__") and sys.modules[name] is slow, "nor is it where all modules are looked at"
    assert slow.number == 5 and sys.modules[name] is package_of_this_test.slow is not slow and slow.number == 5
    with pytest.raises(AttributeError):
        print(slow.letter)
