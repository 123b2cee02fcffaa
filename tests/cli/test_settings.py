"""Settings: one flag per field, four sources in order, errors that name their source, and exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flexbatch.cli import command, settings
from flexbatch.config import EngineConfig, option
from flexbatch.validation.errors import CheckpointError, ConfigurationError, DoesNotFitError


def parse(*words: str, environ: dict[str, str] | None = None, config: Path | None = None) -> EngineConfig:
    parser = argparse.ArgumentParser()
    settings.add_engine_arguments(parser)
    return settings.engine_config(parser.parse_args(words), environ or {}, str(config) if config else None)


def yaml_file(folder: Path, text: str) -> Path:
    (folder / "settings.yaml").write_text(text)
    return folder / "settings.yaml"


def test_every_field_has_a_flag_and_every_flag_a_field() -> None:
    parser = argparse.ArgumentParser()
    settings.add_engine_arguments(parser)
    flags = {action.option_strings[0] for action in parser._actions} - {"-h", "--config"}
    assert flags == {"--" + field.name.replace("_", "-") for field in dataclasses.fields(EngineConfig)}
    assert all(action.help for action in parser._actions)
    assert "(default: chosen)" in parser.format_help() and "(default: 16)" in parser.format_help()


def test_without_anything_the_defaults_hold() -> None:
    assert parse() == EngineConfig()


VALUES = {
    "percent": ("10 20 30 40 50 50", (10.0, 20.0, 30.0, 40.0, 50.0, 50.0)),
    "draft": ("a b", ("a", "b")),
    "lora": ("a=b c=d", ("a=b", "c=d")),
    "weight_bits": ("4", 4),
    "cache_bits": ("8", 8),
    "gpu_memory": ("16GiB", "16GiB"),
    "cpu_memory": ("64GiB", "64GiB"),
    "allow_bits": ("16 4", (16, 4)),
}
"""Where the value of a kind below would not do."""


def value_of(setting: settings.Setting) -> tuple[str, object]:
    """A value other than the default, as text and as the setting holds it."""
    if choices := setting.metadata.get("choices"):
        other = next(choice for choice in choices if choice != setting.default)
        return str(other), other
    by_kind = {
        int: ("7", 7),
        float: ("0.5", 0.5),
        str: ("7", "7"),
        bool: (str(not setting.default).lower(), not setting.default),
    }
    return VALUES.get(setting.name, by_kind[setting.kind])


@pytest.mark.parametrize("setting", settings.settings_of(EngineConfig), ids=lambda setting: setting.name)
def test_every_setting_has_three_sources_in_order(setting: settings.Setting, tmp_path: Path) -> None:
    text, expected = value_of(setting)
    words = [setting.flag] if expected is True else [setting.flag, *text.split()]
    assert getattr(parse(*words), setting.name) == expected
    assert getattr(parse(environ={setting.variable: text}), setting.name) == expected
    value = f"[{text.replace(' ', ', ')}]" if setting.many else text
    assert getattr(parse(config=yaml_file(tmp_path, f"{setting.name}: {value}\n")), setting.name) == expected


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "gpu-batch-size: 3\nnum_gpu_batches: 3\nprefill_chunk: 3\n")
    environ = {"FLEXBATCH_GPU_BATCH_SIZE": "2", "FLEXBATCH_NUM_GPU_BATCHES": "2"}
    config = parse("--gpu-batch-size", "1", environ=environ, config=file)
    assert (config.gpu_batch_size, config.num_gpu_batches, config.prefill_chunk, config.seed) == (1, 2, 3, 0)


def test_booleans_can_be_switched_both_ways() -> None:
    assert parse("--overlap").overlap is True
    assert parse("--overlap", "false", environ={"FLEXBATCH_OVERLAP": "true"}).overlap is False
    assert parse("--no-dummy-weights", environ={"FLEXBATCH_DUMMY_WEIGHTS": "1"}).dummy_weights is False


@pytest.mark.parametrize(
    ("environ", "text", "message"),
    [
        ({"FLEXBATCH_GPU_BATCH_SIZE": "many"}, "", "FLEXBATCH_GPU_BATCH_SIZE='many': needs whole number"),
        ({"FLEXBATCH_OVERLAP": "maybe"}, "", "FLEXBATCH_OVERLAP='maybe': needs true or false"),
        ({"FLEXBATCH_WEIGHT_BITS": "5"}, "", "FLEXBATCH_WEIGHT_BITS=5: choose from 16, 8, 4"),
        ({}, "gpu_batch_size: many", "settings.yaml: gpu_batch_size='many': needs whole number"),
        ({}, "gpu_batch_size: true", "settings.yaml: gpu_batch_size=True: needs whole number"),
        ({}, "gpu_batch_size: 1.5", "settings.yaml: gpu_batch_size=1.5: needs whole number"),
        ({}, "gpu_batch_size: [1]", r"settings.yaml: gpu_batch_size=\[1\]: needs whole number"),
        ({}, "percent: {a: 1}", "settings.yaml: percent={'a': 1}: needs numbers"),
        ({}, "overlap: 1", "settings.yaml: overlap=1: needs true or false"),
        ({}, "cache_bits: 3", "settings.yaml: cache_bits=3: choose from"),
        ({}, "gpu_bach_size: 1", "unknown setting 'gpu_bach_size'; did you mean 'gpu_batch_size'"),
        ({}, "zzz: 1", "unknown setting 'zzz'; known are allow_bits"),
        ({}, "- 1", "needs a mapping of settings"),
        ({}, "a: [", "cannot be read as YAML"),
        ({}, "percent: [60, 60, 0, 0, 0, 0]", r"weights on gpu \(60\) and cpu \(60\)"),
    ],
)
def test_errors_name_their_source(environ: dict, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse(environ=environ, config=yaml_file(tmp_path, text))


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.yaml: cannot be read as YAML: .*No such file"):
        parse(config=tmp_path / "none.yaml")


def test_an_empty_file_and_null_mean_the_default(tmp_path: Path) -> None:
    assert parse(config=yaml_file(tmp_path, "")) == EngineConfig()
    assert parse(config=yaml_file(tmp_path, "gpu_batch_size: null")) == EngineConfig()


@pytest.mark.parametrize(
    "words",
    [
        ["--gpu-batch-size", "x"],
        ["--weight-bits", "5"],
        ["--overlap", "maybe"],
        ["--percent", "1", "2"],
        ["--nonsense"],
        ["--gpu-batch", "3"],
    ],
)
def test_bad_words_on_the_command_line_exit_2(words: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    settings.add_engine_arguments(parser)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(words)
    assert stopped.value.code == 2


def test_a_command_has_settings_of_its_own(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Job:
        rows: int = option(5, "rows of a shard")

    parser = argparse.ArgumentParser()
    settings.add_engine_arguments(parser)
    settings.add_arguments(parser, Job, "job")
    file = str(yaml_file(tmp_path, "rows: 9\nseed: 4\n"))
    engine, job = settings.read_settings([EngineConfig, Job], parser.parse_args([]), {}, file)
    assert (engine.seed, job) == (4, Job(9))
    with pytest.raises(ConfigurationError, match="unknown setting 'rows'"):
        settings.engine_config(parser.parse_args([]), {}, file)


def test_a_field_without_a_flag_form_is_found_at_once() -> None:
    @dataclass(frozen=True)
    class Odd:
        table: dict | None = None

    with pytest.raises(TypeError, match="field table has type"):
        settings.settings_of(Odd)


class OutOfMemoryError(RuntimeError):
    """Stands for torch's."""


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (None, 0),
        (0, 0),
        (3, 3),
        (RuntimeError("bug"), 1),
        (ValueError("bug"), 1),
        (ConfigurationError("bad"), 2),
        (CheckpointError("no config.json"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "/offload"), 2),
        (OSError(errno.EROFS, "Read-only file system", "/offload"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "/offload"), 4),
        (OSError(errno.EIO, "Input/output error", "/offload"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file", "/prompts"), 2),
        (DoesNotFitError("needs 5 GiB"), 4),
        (OutOfMemoryError("CUDA out of memory"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(outcome, code: int, caplog: pytest.LogCaptureFixture) -> None:
    def main(data) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert command.run_command(main, resume="flexbatch again") == code
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert ("Traceback" in caplog.text) == (code == 1)
    assert ("resume with: flexbatch again" in caplog.text) == (code == 130)
    if isinstance(outcome, Exception):
        system = isinstance(outcome, OSError)
        assert (f"{outcome.filename}: {outcome.strerror}" if system else str(outcome)) in caplog.text


def test_sigterm_ends_a_command_as_an_interruption() -> None:
    script = (
        "import sys, time\nfrom flexbatch.cli import command\ncommand.set_up_logging()\n"
        "def main(data):\n    print('ready', file=data, flush=True)\n    "
        "time.sleep(30)\nsys.exit(command.run_command(main, 'again'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted; resume with: again" in errors


def test_a_forked_helper_ends_without_a_traceback() -> None:
    """lm_eval ends its pool of processes so; a handler that raises would print one of each that waits for work."""
    script = (
        "import multiprocessing, sys, time\nfrom flexbatch.cli import command\n"
        "def main(data):\n    helper = multiprocessing.get_context('fork').Process(target=time.sleep, args=(30,))\n "
        "   helper.start()\n    time.sleep(0.5)\n"
        "    helper.terminate()\n    helper.join()\n    print(helper.exitcode, "
        "file=data)\nsys.exit(command.run_command(main))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{-signal.SIGTERM}\n", "")


def test_the_log_holds_what_this_package_says_and_warnings_of_libraries() -> None:
    script = (
        "import logging\nfrom flexbatch.cli import command\ncommand.set_up_logging()\n"
        "for name in ('flexbatch', 'httpx'):\n    logging.getLogger(name).info('info of %s', name)\n    "
        "logging.getLogger(name).warning('warning of %s', name)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == [
        "INFO info of flexbatch",
        "WARNING warning of flexbatch",
        "WARNING warning of httpx",
    ]


def test_a_reader_that_goes_away_is_no_crash_report() -> None:
    script = (
        "import sys\nfrom flexbatch.cli import command\ndef main(data):\n"
        "    for i in range(100000): print(i, file=data)\nsys.exit(command.run_command(main))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == ""
    assert process.wait(20) == 1


def test_settings_import_no_torch() -> None:
    script = (
        "import sys, flexbatch.cli, flexbatch.request, flexbatch.trace; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], env=os.environ).returncode == 0
