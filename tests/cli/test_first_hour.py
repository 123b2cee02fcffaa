"""The first hour with the commands: what somebody mistypes or lacks is told at once, in one line, and stdout is data.

Each row starts a process, as a user does. That it imports nothing heavy is what makes it quick; how quick that is
measures `benchmark/first_hour.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from flexbatch.__main__ import COMMANDS, main
from flexbatch.apps.completion import CompletionConfig
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.cli.run_settings import RunConfig, SamplingConfig
from flexbatch.cli.settings import refuse_misspelled, settings_of
from flexbatch.config import EngineConfig
from flexbatch.files.atomic import temporary_name
from flexbatch.planner.budgets import DTYPES as TORCH_DTYPES
from flexbatch.policy.command_line import Parser, command_name, typed_words
from flexbatch.policy.suggest import nearest
from flexbatch.policy.units import parse_size, size_text
from flexbatch.validation.checks import check_keywords
from flexbatch.validation.devices import DTYPES, GPU_FILES, check_device
from flexbatch.validation.errors import ConfigurationError, told

ROOT = Path(__file__).parents[2]
SCREEN_LINES, SCREEN_COLUMNS = 26, 80
HEAVY = ("torch", "transformers", "pyarrow", "datasets", "scipy")
HAS_GPU = any(next(Path("/dev").glob(name), None) for name in GPU_FILES)


@dataclasses.dataclass(frozen=True)
class Told:
    """How a process ended."""

    code: int
    out: str
    lines: list[str]
    """Of stderr, without the time and level of the log."""
    heavy: list[str]
    """Libraries that it has imported, of those that take long."""


def start(words: Sequence[str], folder: Path, **environ: str) -> Told:
    """``python -m WORDS`` in a folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEXBATCH_")}
    variables = {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": str(SCREEN_COLUMNS), **environ}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *words],
        cwd=folder, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    names = {line.rpartition("|")[2].strip() for line in imports}
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    lines = [re.sub(r"^\d\d:\d\d:\d\d [A-Z]+ ", "", line) for line in told]
    return Told(done.returncode, done.stdout, lines, [name for name in HEAVY if name in names])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies about where a user works."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "prompts.jsonl").write_text('{"prompt": "def main():"}\n')
    (folder / "settings.yaml").write_text("gpu_memry: 16GiB\n")
    (folder / "schema.json").write_text('{"type": "object", "properties": 5}')
    (folder / "lists.jsonl").write_text('["a"]\n')
    (folder / "a-file").touch()
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").touch()
    (folder / "models" / "llama-8b").mkdir(parents=True)
    return folder


BATCH = ["batch", "prompts.jsonl"]
COMPLAINTS: dict[str, tuple[list[str], str]] = {
    "no such command": (["rnu"], r"unknown command rnu; did you mean run\?"),
    "no such flag": (["run", "--max-tokes", "3"], r"unknown flag --max-tokes; did you mean --max-tokens\?"),
    "underscores in a flag": (
        ["batch", "--gpu_memory", "3"],
        r"unknown flag --gpu_memory; did you mean --gpu-memory\?",
    ),
    "a flag cut short": (["complete", "--temp=1"], r"unknown flag --temp; did you mean --temperature\?"),
    "a flag of another library": (["run", "--max-new-tokens", "3"], r"did you mean --max-tokens\?"),
    "a flag like no other": (["run", "--zzzz"], r"unknown flag --zzzz; .* --help-all lists the flags"),
    "no such choice": ([*BATCH, "out", "--truncate", "lefft"], r"--truncate: .*'lefft'.* did you mean left\?"),
    "an argument too few": (["batch", "prompts.jsonl"], r"missing OUTPUT; see .* batch --help"),
    "a number that is none": (["run", "--max-tokens", "many"], r"--max-tokens.*'many': needs whole number"),
    "no such model folder": (
        ["run", "--model", "./models/lama-8b"],
        r"lama-8b does not exist; did you mean .*/?llama-8b",
    ),
    "a folder without a model": (["run", "--model", "notes"], r"notes is no model folder: it has neither config\.json"),
    "demo misspelled": (["run", "--model", "demmo"], r"'demmo' is no local folder; did you mean demo\?"),
    "a draft misspelled": (
        ["run", "--draft", "demo-drft"],
        r"'demo-drft' is no local folder; did you mean demo-draft\?",
    ),
    "a shape as a model": (["run", "--model", "opt-30b"], r"name of a public shape: with --dummy-weights"),
    "no such shape": (
        ["run", "--dummy-weights", "--model", "opt-30"],
        r"no public shape 'opt-30'.* did you mean opt-30b\?",
    ),
    "no such device": (["run", "--device", "tpu"], r"device 'tpu' is not known"),
    "a device misspelled": (["complete", "a", "--device", "cdua"], r"device 'cdua' is not known; did you mean cuda\?"),
    "no such dtype": (["run", "--dtype", "flaot32"], r"dtype 'flaot32' is not known; did you mean float32\?"),
    "no such machine": (["run", "--hardware", "foo"], r"--hardware foo: no machine and no file 'foo'"),
    "no such tree": (["run", "--draft", "ngram", "--tree", "oak"], r"not a tree: 'oak'; write chain:N"),
    "no such prompts": (
        ["run", "--prompts", "prompt.jsonl"],
        r"--prompts prompt\.jsonl does not exist; did you mean prompts\.jsonl",
    ),
    "prompts that are a folder": (["complete", "--prompts", "notes"], r"--prompts notes is a folder; give a file"),
    "a size without unit": (["run", "--gpu-memory", "16"], r"gpu_memory: 16 would be bytes.* did you mean 16GiB\?"),
    "a size with half a unit": (["run", "--cpu-memory", "64G"], r"cpu_memory: .*'64G'; did you mean 64GiB\?"),
    "a size that is none": (
        ["run", "--cpu-memory", "lots"],
        r"cpu_memory: not a size in bytes: 'lots'; write e\.g\. 16GiB",
    ),
    "a size in the plan": (["plan", "opt-30b", "--gpu-memory", "16"], r"did you mean 16GiB\?"),
    "a key of YAML": (
        ["run", "--config", "settings.yaml"],
        r"settings\.yaml: unknown setting 'gpu_memry'; did you mean 'gpu_memory'",
    ),
    "no such settings file": (["run", "--config", "none.yaml"], r"none\.yaml: cannot be read"),
    "a temperature below zero": (["run", "--temperature", "-1"], r"temperature=-1\.0 must be >= 0"),
    "no block": (["run", "--gpu-batch-size", "0"], r"gpu_batch_size=0 must be at least 1"),
    "an offload folder that is a file": (
        ["run", "--offload-dir", "a-file"],
        r"--offload-dir a-file: .*/a-file is a file; give a folder",
    ),
    "output in no folder": (["run", "--output", "none/x.jsonl"], r"output none/x\.jsonl: cannot be written"),
    "output over the input": (
        ["run", "--prompts", "prompts.jsonl", "--output", "prompts.jsonl"],
        r"is the file of --prompts",
    ),
    "a plot without a plan": (["run", "--plot", "x.png"], r"--plot draws the plan of a --dry-run"),
    "no such input": (
        ["batch", "prompts.json", "out"],
        r"input prompts\.json does not exist; did you mean prompts\.jsonl",
    ),
    "no such folder of input": (["batch", "articles", "out"], r"input articles does not exist; a data set .* --split"),
    "no such path of input": (["batch", "notes/articles", "out"], r"input notes/articles does not exist"),
    "output that is a file": ([*BATCH, "a-file"], r"output a-file is a file; give a folder"),
    "output of somebody else": ([*BATCH, "notes"], r"output notes already holds mine\.txt and no job"),
    "no such device for a job": ([*BATCH, "out", "--device", "tpu"], r"device 'tpu' is not known"),
    "no such tables": (["wrangle", "nowhere"], r"data set folder nowhere does not exist"),
    "no such shape to plan": (["plan", "opt-30"], r"opt-30 is no public shape, file or folder; did you mean opt-30b\?"),
    "no such card": (["plan", "opt-30b", "--gpu", "RTX 409"], r"--gpu RTX 409: .* did you mean rtx-4090\?"),
    "a plot in no folder": (["plan", "opt-30b", "--gpu", "t4", "--plot", "no/x.png"], r"--plot no/x\.png: its folder"),
    "nothing to inspect": (["inspect", "demmo"], r"'demmo' is no local folder; did you mean demo\?"),
    "no device to inspect for": (["inspect", "--device", "tpu"], r"device 'tpu' is not known"),
    "no device for HELM": (["helm", "--description", "x", "--device", "tpu"], r"device 'tpu' is not known"),
    "no device to measure": (["profile", "-o", "x.json", "--device", "tpu"], r"device 'tpu' is not known"),
    "a flag of the whole command": (["--hlep"], r"unknown command --hlep; did you mean --help\?"),
    "one dash too few": (["run", "-max-tokens", "3"], r"unknown flag -max-tokens; did you mean --max-tokens\?"),
    "a letter": (["complete", "-m", "demo", "a"], r"unknown flag -m; did you mean --model\?"),
    "another program's output": (
        [*BATCH, "--output-file", "x"],
        r"unknown flag --output-file; did you mean --output\?",
    ),
    "prompts as a word": (["run", "p.txt"], r"unrecognized arguments: p\.txt; did you mean --prompts p\.txt\?"),
    "a tree without a draft": (["run", "--tree", "chain:3"], r"--tree is for speculation: give --draft MODEL"),
    "nothing to compare": (["run", "--compare-plain"], r"--compare-plain is for speculation: give --draft MODEL"),
    "no such tokenizer": (["run", "--tokenizer", "./toknizer"], r"toknizer does not exist"),
    "no folder can be made": (
        ["run", "--offload-dir", "/proc/x"],
        r"--offload-dir /proc/x: nothing can be made in /proc",
    ),
    "a folder below a file": (["run", "--offload-dir", "a-file/x"], r"--offload-dir a-file/x: .*/a-file is a file"),
    "no job can be there": ([*BATCH, "/proc/x"], r"output /proc/x: nothing can be made in /proc"),
    "a trace that is a folder": (["run", "--trace", "notes"], r"--trace notes is a folder; name a file"),
    "a trace nowhere": (["run", "--trace", "/proc/x.json"], r"--trace /proc/x\.json: nothing can be made in /proc"),
    "answers into a folder": (["complete", "a", "--output", "notes"], r"--output notes is a folder; name a file"),
    "answers nowhere": (["complete", "a", "--flexflow-output", "no/x"], r"--flexflow-output no/x: its folder does not"),
    "answers where the text goes": (["complete", "a", "--output", "-"], r"--output -: the text goes there; --json"),
    "rows that are no CSV": (["run", "--output", "out.csv"], r"rows are written as JSON lines; name it out\.jsonl"),
    "no name for the rows": (["run", "--output", ""], r"--output is empty; name a file"),
    "no name of prompts": (["run", "--prompts", ""], r"--prompts is empty; name a file"),
    "a plot of no kind": (["plan", "opt-30b", "--gpu", "t4", "--plot", "x.foo"], r"no picture is written as \.foo"),
    "a plot that is a folder": (["plan", "opt-30b", "--gpu", "t4", "--plot", "notes"], r"--plot notes is a folder"),
    "a sweep without units": (["plan", "opt-30b", "--sweep", "gpu_memory=8:16:3"], r"--sweep .*did you mean 8GiB\?"),
    "a sweep without end": (["plan", "opt-30b", "--sweep", "gpu_memory=8GiB:9GiB:9999"], r"needs 2 to 100 steps"),
    "prompts of no token": (["plan", "opt-30b", "--prompt-len", "9", "0"], r"--prompt-len 0 must be at least 1"),
    "a template with half a field": (
        [*BATCH, "out", "--prompt-template", "Sum: {text"],
        r"prompt template 'Sum: \{text': expected '\}'",
    ),
    "no folder for a profile": (["profile", "-o", "none/x.json"], r"--output none/x\.json: no file can be written"),
    "a default of no adapter": (["run", "--lora-default", "b"], r"lora_default='b' is none of the adapters .*: none"),
    "a folder of no adapter": (
        ["complete", "a", "--lora", "x=notes"],
        r"--lora x=notes: has no adapter_config\.json; give the folder that save_pretrained",
    ),
    "an expression that is none": (["run", "--regex", "a("], r"--regex a\(: .*unclosed group"),
    "an expression for a job": ([*BATCH, "out", "--regex", r"(a)\1"], r"--regex .*backreferences are not supported"),
    "a schema that is none": (
        ["complete", "a", "--json-schema", "schema.json"],
        r"--json-schema schema\.json: does not compile: properties must be an object",
    ),
    "a folder of no tokenizer": (["run", "--tokenizer", "notes"], r"notes has no tokenizer: give a folder with token"),
    "a tree that is a forest": (
        ["run", "--draft", "ngram", "--tree", "chain:99999999"],
        r"'chain:99999999' has more than 1,024 nodes; ask for fewer",
    ),
    "a value like a flag": (
        ["run", "--cpu-memory", "-4GiB"],
        r"--cpu-memory: expected one argument, and -4GiB is read as a flag: .* write --cpu-memory=-4GiB;",
    ),
    "GPUs that nobody shares": (["plan", "opt-30b", "--gpus", "2"], r"--gpus 2 is for --parallel auto: add it"),
    "GPUs that nobody counted": (["plan", "opt-30b", "--gpu", "t4", "--parallel", "auto"], r"say how many .*--gpus N"),
    "a disk of less than nothing": (["plan", "opt-30b", "--disk", "-5"], r"--disk: not a size in bytes: '-5'"),
    "a stop token below zero": (["run", "--stop-token-ids", "-1"], r"stop_token_ids=.* must be >= 0"),
    "a list of words": (["complete", "--prompts", "lists.jsonl"], r"lists\.jsonl: line 1 is a list that holds 'a'; a "),
}  # fmt: skip
"""What went wrong -> the words after ``flexbatch``, and what the line says."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i % 3 == 0 else pytest.mark.slow) for i, name in enumerate(COMPLAINTS)]
)
def test_what_is_wrong_is_told_in_one_line_before_anything_heavy_is_imported(name: str, folder: Path) -> None:
    words, message = COMPLAINTS[name]
    told = start(["flexbatch", *words], folder)
    assert told.code == 2 and told.out == "" and len(told.lines) == 1, told
    assert re.search(message, told.lines[0]), told.lines
    assert not told.heavy, told
    assert "Errno" not in told.lines[0]


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told_at_once(folder: Path) -> None:
    told = start(["flexbatch", "run", "--device", "cuda"], folder)
    assert told.code == 2 and "this machine has no CUDA device" in told.lines[0] and not told.heavy


def test_a_variable_that_is_misspelled_is_no_setting_that_is_ignored(folder: Path) -> None:
    told = start(["flexbatch", "run"], folder, FLEXBATCH_GPU_MEMROY="1GiB")
    assert told.code == 2 and told.lines == [
        "unknown variable FLEXBATCH_GPU_MEMROY; did you mean FLEXBATCH_GPU_MEMORY?"
    ]


def test_variables_of_other_commands_are_no_typos() -> None:
    """A shell may have settings of several commands, and variables of other programs."""
    commands = [(RunConfig, SamplingConfig, EngineConfig), (JobConfig, EngineConfig)]
    commands += [(CompletionConfig, SamplingConfig, EngineConfig), (EngineConfig,)]
    variables = [{setting.variable for each in classes for setting in settings_of(each)} for classes in commands]
    for known in variables:
        refuse_misspelled(dict.fromkeys(set().union(*variables, {"FLEXBATCH_HELM_PYTHON"}), "1"), known)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_and_imports_nothing_heavy(command: str, folder: Path) -> None:
    told = start(["flexbatch", *command.split(), "--help"], folder)
    help_lines = told.out.splitlines()
    assert told.code == 0 and not told.lines and not told.heavy
    assert len(help_lines) <= SCREEN_LINES, told.out
    python = os.path.basename(sys.executable)
    assert help_lines[0].startswith(f"usage: {python} -m flexbatch {command}".rstrip())
    if command and command != "lm-eval":
        assert all(len(line) <= SCREEN_COLUMNS for line in help_lines if f"-m flexbatch {command}" not in line)
        assert help_lines[-1].startswith(f"{python} -m flexbatch {command} --help-all shows ") or command == "profile"


def parser_of(command: str) -> Parser:
    load, _ = COMMANDS[command]
    return sys.modules[load().__module__].make_parser()  # type: ignore[no-any-return]


PARSERS = [name for name in COMMANDS if name != "lm-eval"]


@pytest.mark.parametrize("command", PARSERS)
def test_every_flag_is_in_the_whole_help_under_a_title(command: str) -> None:
    parser = parser_of(command)
    text, first = parser.format_help(), parser.format_first()
    for action in parser._actions:
        if action.option_strings and action.help != "==SUPPRESS==":
            assert re.search(rf"^  (-\w.*, )?{action.option_strings[0]}\b", text, re.MULTILINE), action.option_strings
    assert "\noptions:" not in text or command == "profile"
    flags = re.findall(r"^  (--[\w-]+)", first, re.MULTILINE)
    assert 3 <= len(flags) <= 10 and len(set(flags)) == len(flags), flags


@pytest.mark.parametrize(
    ("words", "name", "typed"),
    [
        (["/usr/bin/python3", "-m", "flexbatch", "run", "a b"], "python3 -m flexbatch run", None),
        (["python", "-X", "dev", "-u", "-m", "flexbatch.run", "--n", "2"], "python -m flexbatch.run", None),
        (["python", "/opt/bin/flexbatch", "run", "--n", "2"], "flexbatch run", ["flexbatch", "run", "--n", "2"]),
        (["python", "-m", "pytest", "run"], "flexbatch run", None),
        (["python", "script.py"], "flexbatch run", None),
        (["python"], "flexbatch run", None),
    ],
)
def test_usage_and_resume_name_the_command_that_was_typed(words: list[str], name: str, typed: list[str] | None) -> None:
    assert command_name("flexbatch run", words) == name and typed_words(words) == (typed or words)


def test_keywords_and_other_names_come_with_a_suggestion() -> None:
    with pytest.raises(ConfigurationError, match=r"'gpu_bach_size'; did you mean 'gpu_batch_size'"):
        check_keywords("LLM", ["gpu_bach_size"], EngineConfig.__dataclass_fields__)
    assert nearest("GPU_memory", ["gpu-memory", "cpu-memory"]) == "gpu-memory"
    assert nearest("max-tok", ["max-errors", "max-tokens", "max-tokens-column"]) == "max-tokens"
    assert nearest("qqq", ["gpu-memory"]) is None and nearest("a", []) is None


@pytest.mark.parametrize("text", ["1", "16", "24.5", "2048"])
def test_small_numbers_are_asked_for_their_unit(text: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean {text}GiB\?"):
        parse_size(text)
    if text.isdigit():
        with pytest.raises(ConfigurationError, match=rf"cpu_memory: .*did you mean {text}GiB\?"):
            EngineConfig(cpu_memory=int(text))


def test_sizes_are_never_zeros_with_a_unit() -> None:
    assert [size_text(size) for size in (0, 0.3, 1, 1023, 1024)] == [
        "0 bytes",
        "1 bytes",
        "1 bytes",
        "1023 bytes",
        "1.000 KiB",
    ]
    assert parse_size("0") == 0 and parse_size("1048576") == 2**20 and parse_size("1 kib") == 1024


def test_messages_name_files_as_the_user_does() -> None:
    """Files that are being written have another name until they are whole."""
    for path in ("out.jsonl", "/a/b/part-00000.parquet", "./x", ".hidden"):
        error = OSError(28, "No space left on device", str(temporary_name(Path(path))))
        assert told(error) == f"{Path(path)}: No space left on device"
        assert told(temporary_name(Path(path))) == str(Path(path))
    assert told("a file .x.tmp of the user") == "a file .x.tmp of the user"
    assert told(OSError(28, "No space left on device")) == "No space left on device"
    assert told(OSError("of a library")) == "of a library"


def test_devices_are_known_by_their_drivers(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no CUDA device"):
        check_device("cuda:1", tmp_path)
    (tmp_path / "nvidiactl").touch()
    check_device("cuda:1", tmp_path)
    assert set(DTYPES) == set(TORCH_DTYPES)


def test_a_plan_is_data_and_nothing_else_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--prompts", str(folder / "prompts.jsonl"), "--dry-run", "--json", "--device", "cpu"]
    assert main([*words, "--hardware", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]
