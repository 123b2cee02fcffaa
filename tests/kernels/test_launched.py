"""Launches of Triton's kernels reach the programs that Triton itself would choose, with the same arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def told():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.launched_programs"]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_every_launch_is_that_of_triton(told):
    assert told["same"] == told["launches"]
    assert 1000 < told["programs"] <= told["known"] <= told["launches"] / 2, "the second half is of known programs"


def test_what_is_no_constant_is_not_kept_under_its_name(told):
    assert told["kept_by_name"] == 0 and told["with_sizes"] == 20


def test_what_a_type_does_not_tell_is_not_kept_under_it(told):
    right, launches = told["untold"]
    assert right == launches == 18
