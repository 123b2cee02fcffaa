"""Kernels are compiled before they are measured: every call that is made for it can be made."""

from __future__ import annotations

import subprocess

import pytest
import torch

from flexbatch.calibrate import compiling
from flexbatch.calibrate.compiling import call_part, compiled_ahead, make, small_pass_calls
from flexbatch.calibrate.kernels import attention_call, cache_rows, calls_of_a_profile

CPU = torch.device("cpu")


def test_every_call_of_a_small_pass_can_be_made():
    for call in small_pass_calls(CPU):
        call()


def test_a_call_that_fails_stops_no_other():
    made = []
    for call in (lambda: made.append(1), lambda: 1 / 0, lambda: made.append(2)):
        make(call)
    assert made == [1, 2]


def test_parts_are_called_in_processes_beside_the_body(tmp_path, monkeypatch):
    """A stand-in for the interpreter keeps the arguments of each; on a CPU there is nothing to compile."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nsleep 0.2; echo "$3" "$2" > {tmp_path}/part-"$3"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stand_in))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with compiled_ahead(CPU):
        assert not list(tmp_path.glob("part-*")), "the body does not wait"
    told = sorted(path.read_text() for path in tmp_path.glob("part-*"))
    assert [each.split()[0] for each in told] == ["0", "1", "2"]
    assert all("call_part('cpu', int(sys.argv[1]), 3)" in each for each in told)


@pytest.fixture
def started(monkeypatch):
    """The processes that were started."""
    found, start = [], subprocess.Popen

    def noted(*arguments, **options):
        found.append(start(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    return found


def test_processes_that_hang_are_ended(tmp_path, monkeypatch, started):
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\nexec sleep 600\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stand_in))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(compiling, "LIMIT_SECONDS", 0.2)
    with compiled_ahead(CPU, 2):
        pass
    with pytest.raises(KeyboardInterrupt), compiled_ahead(CPU, 2):
        raise KeyboardInterrupt
    assert len(started) == 4 and all(each.returncode is not None for each in started)


def test_processes_that_fail_say_nothing(tmp_path, monkeypatch, capfd):
    """Each had a traceback on the terminal, eight of them after Ctrl-C."""
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\necho out; echo Traceback >&2; exit 1\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stand_in))
    with compiled_ahead(CPU, 2):
        pass
    assert capfd.readouterr() == ("", "")


def test_where_no_more_processes_can_be_started_the_others_do_their_part(tmp_path, monkeypatch, started):
    stand_in, start = tmp_path / "python", subprocess.Popen
    stand_in.write_text("#!/bin/sh\nexec sleep 600\n")
    stand_in.chmod(0o755)

    def limited(*arguments, **options):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return start(*arguments, **options)

    monkeypatch.setattr("sys.executable", str(stand_in))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(compiling, "LIMIT_SECONDS", 0.1)
    monkeypatch.setattr(subprocess, "Popen", limited)
    ran = []
    with compiled_ahead(CPU, 3):
        ran.append(1)
    assert ran and len(started) == 1 and started[0].returncode is not None


def test_all_that_a_gpu_measures_is_compiled(monkeypatch):
    """On a CPU the same calls run without a compiler; what needs a GPU's host memory is left out."""
    calls = []
    monkeypatch.setattr("flexbatch.calibrate.kernels.page_calls", lambda *sizes: calls.append(sizes) or {})
    monkeypatch.setattr("flexbatch.calibrate.kernels.CONTEXT", 64)
    monkeypatch.setattr("flexbatch.calibrate.kernels.HEAD_DIM", 16)
    found = calls_of_a_profile(CPU, torch.float32)
    assert len(found) > len(small_pass_calls(CPU)) + 6
    for call in found:
        call()
    assert calls == [(CPU, 4, 256)]


@pytest.mark.parametrize("bits", [16, 4])
def test_rows_of_a_cache_on_the_cpu_repeat_what_was_drawn(bits, monkeypatch):
    monkeypatch.setattr("flexbatch.calibrate.kernels.DRAWN_TOKENS", 48)
    rows = cache_rows(128, 2, torch.float32, CPU, bits)
    assert len(rows) == 128 and torch.equal(rows[48:96], rows[:48]) and torch.equal(rows[96:], rows[:32])
    assert len(rows[:48].flatten(1).unique(dim=0)) == 48
    assert attention_call(rows, 1, 32, (4, 2), torch.float32, bits)().isfinite().all()


@pytest.mark.gpu
def test_a_gpu_compiles_all_of_them(monkeypatch):
    failed = []
    monkeypatch.setattr(compiling.logger, "debug", lambda *told: failed.append(told))
    call_part("cuda:0", 0, 1)
    assert not failed, failed
