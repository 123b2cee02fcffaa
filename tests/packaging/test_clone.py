"""A clone has all that its tests and its code name: nothing beside the repository is looked for."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
LIMIT_BYTES = 128 * 1024


def tracked(*patterns: str) -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [ROOT / name for name in names.splitlines() if (ROOT / name).is_file()]


def test_no_file_names_a_folder_beside_the_repository() -> None:
    """A test that skips where such a folder is missing passes on one machine alone."""
    beside = re.compile(r"""\.\./shared|["']shared["'] /|/ ["']shared["']""")
    files = [
        path
        for path in tracked("*.py", "*.md", "*.cfg", "*.toml", "*.sh", ".ci/run")
        if path != Path(__file__).resolve()
    ]
    assert len(files) > 200
    assert not [str(path.relative_to(ROOT)) for path in files if beside.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "humaneval.jsonl", "mt_bench.jsonl"])
def test_prompts_of_benchmarks_are_small_different_and_named_with_their_license(name: str) -> None:
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) >= 40 and all(
        row.keys() == {"id", "prompt"} for row in rows
    )
    assert (DATA / name).stat().st_size < LIMIT_BYTES
    (line,) = (line for line in (DATA / "README.md").read_text(encoding="utf-8").splitlines() if f"`{name}`" in line)
    assert "MIT" in line or "Apache-2.0" in line
