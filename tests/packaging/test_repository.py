"""What a newcomer relies on: the README's commands, the subcommands, and a repository root that breaks nobody's
imports."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
from pathlib import Path

import pytest

from flexbatch.__main__ import COMMANDS, main
from tests.processes import Forked

ROOT = Path(__file__).parents[2]
COMMANDS_OF_THE_README = ["pip install -e . && python -m flexbatch.run", 'pip install -e ".[test]" && pytest']


def first_bash_block() -> list[str]:
    block = re.search(
        r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert block is not None
    return block[1].splitlines()


def test_readme_promises_two_commands_and_ci_runs_them() -> None:
    assert first_bash_block() == COMMANDS_OF_THE_README
    extraction = re.search(r"awk '.*?' README\.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert extraction is not None, ".ci/run must take the commands from README.md"
    read = subprocess.run(["bash", "-c", extraction[0]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert read.stdout.splitlines() == COMMANDS_OF_THE_README


def test_a_transformers_model_is_built_from_the_root() -> None:
    """The root holds a folder ``kernels``; transformers imports a package of that name, installed or not. The process
    that is forked here has imported transformers with the root first in its path."""
    process = Forked("tests.packaging.tiny_llama", [])
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.strip() == "64"


def test_the_layout_in_contributing_is_that_of_the_repository() -> None:
    layout = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Layout")[2].partition("\n## ")[0]
    files = set(re.findall(r"`(?:flexbatch/)?(\w+\.py)`", layout.partition("`tests/test_imports.py`")[0]))
    assert files == {path.name for path in (ROOT / "flexbatch").glob("*.py")} - {"__init__.py"}
    folders = set(re.findall(r"`flexbatch/(\w+)/`", layout))
    assert folders == {
        path.parent.name for path in (ROOT / "flexbatch").glob("*/__init__.py") if not path.parent.is_symlink()
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_its_module(name: str) -> None:
    (module,) = re.findall(r"from ([\w.]+) import main", inspect.getsource(COMMANDS[name][0]))
    assert importlib.util.find_spec(module) is not None


def test_unknown_subcommand_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rnu"]) == 2
    captured = capsys.readouterr()
    assert "unknown command rnu; did you mean run?" in captured.err
    assert captured.err.count("\n") == 1, "a typo gets one line"
    assert main(["qqq"]) == 2
    captured = capsys.readouterr()
    assert "unknown command qqq" in captured.err and "--help lists them" in captured.err
    assert captured.out == ""


def test_version_and_help_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    from flexbatch import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"flexbatch {__version__}"
    assert main(["--help"]) == 0
    assert "usage: flexbatch COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "megabytes"), [("demo", 8.0), ("demo-draft", 1.0)])
def test_demo_models_are_small_and_complete(name: str, megabytes: float) -> None:
    folder = ROOT / "flexbatch" / "data" / name
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md", *tokenizer} == set(files)
    assert sum(files.values()) <= megabytes * 1e6
    config = json.loads((folder / "config.json").read_text())
    assert config["num_key_value_heads"] < config["num_attention_heads"]


def test_draft_has_the_targets_tokenizer_and_both_complete_a_line() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "import os\nimport sys\n\nfor name in os.listdir(path):\n    if name."
    encoded = []
    for name in ("demo", "demo-draft"):
        folder = ROOT / "flexbatch" / "data" / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert tokenizer.decode(ids[0]) == prompt
        assert tokenizer.bos_token_id not in ids
        encoded.append(ids[0].tolist())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        following = model(ids).logits[0, -1].softmax(-1)
        assert following[tokenizer.encode("startswith")[0]] > 0.05, name  # an untrained model gives it about 1/4096
    assert encoded[0] == encoded[1]
