"""The wheel holds what the repository holds through links, and works far from the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flexbatch.kernels.native_cache import user_cache_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the committed and new files, without isolation: nothing is downloaded, and no build
    folder is left in the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in (name for name in names if not name.startswith("tests/") and (ROOT / name).exists()):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("flexbatch-*.whl")
    return built


def test_wheel_holds_the_package_and_its_data_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    data = [
        f"data/{model}/{file}"
        for model in ("demo", "demo-draft")
        for file in ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    ]
    linked = [
        "policy/policy.py",
        "policy/profiles/t4.json",
        "kernels/reference.py",
        "kernels/native_attention.c",
        "kernels/native_rows.h",
        "apps/jobs/plan.py",
    ]
    assert not {f"flexbatch/{name}" for name in ("engine.py", "models/families.py", *data, *linked)} - set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flexbatch"}, (
        "only flexbatch may be a top-level name"
    )
    assert not [name for name in names if name.endswith("kernels/__init__.py")]


def test_wheel_runs_outside_the_root(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import flexbatch.kernels.reference, flexbatch.policy.policy, flexbatch.apps\n"
        "from flexbatch import LLM, SamplingParams\n"
        "with LLM('demo', device='cpu', hardware='cpu') as llm:\n"
        "    print(len(llm.generate(['import os'], SamplingParams(max_tokens=3, temperature=0, "
        "ignore_eos=True))[0].token_ids), llm.engine_plan.model.folder)\n"
    )
    # What is compiled is found by what its sources hold: those of the wheel are these.
    if (compiled := user_cache_folder("native")).exists():
        shutil.copytree(compiled, tmp_path / ".cache" / "flexbatch" / "native")
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, folder = done.stdout.split()
    assert (count, Path(folder)) == ("3", site / "flexbatch" / "data" / "demo")
