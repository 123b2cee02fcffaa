"""What the package imports is what it requires: a fresh environment on any machine has it."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTED_AS = {
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "huggingface-hub": "huggingface_hub",
    "lm-eval": "lm_eval",
    "python-multipart": "python_multipart",
}
"""Distributions whose modules have another name."""
SERVE = {"fastapi", "uvicorn", "prometheus_client", "python_multipart"}
BRING_THEIR_OWN = {"gguf", "helm", "llguidance", "ray", "lm_eval", "sklearn", "matplotlib", *SERVE}
"""Modules of extras and of HELM's environment: what uses them says which extra to install."""
COME_ALONG = {"fsspec": "datasets", "jinja2": "torch"}
"""Modules that another requirement cannot be without. What transformers loads tokenizers with is required, and
imported nowhere."""


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def modules_of(requirements: str) -> set[str]:
    names = [re.match(r"[A-Za-z0-9_.-]+", line.strip()) for line in requirements.splitlines() if line.strip()]
    return {IMPORTED_AS.get(name[0].lower(), name[0].lower()) for name in names if name}


def third_party_imports(folder: Path) -> dict[str, list[str]]:
    """Top-level module -> the places that import it, at the top of a file or later."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"flexbatch"}:
                found.setdefault(name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_every_import_is_a_requirement_and_every_requirement_is_imported() -> None:
    required = modules_of(setup_cfg()["options"]["install_requires"])
    imported: dict[str, list[str]] = {}
    for folder in ("flexbatch", "policy", "kernels", "apps"):
        for name, positions in third_party_imports(ROOT / folder).items():
            imported.setdefault(name, []).extend(positions)
    missing = {
        name: positions
        for name, positions in imported.items()
        if name not in required | BRING_THEIR_OWN and COME_ALONG.get(name) not in required
    }
    assert not missing, "imported, and in no environment that install_requires makes"
    assert required - imported.keys() <= {"tokenizers"}, "required, and imported nowhere"


def test_nothing_depends_on_what_only_the_tests_bring() -> None:
    """A solver that was looked for and found wherever the extra `test` was installed made every check pass and every
    fresh environment fail."""
    options, extras = setup_cfg()["options"], setup_cfg()["options.extras_require"]
    users = ("gguf", "lm-eval", "ray", "plot", "structured", "wrangle", "serve")
    for_users = modules_of("\n".join([options["install_requires"], *(extras[name] for name in users)]))
    only_tests = modules_of(extras["test"] + extras["dev"]) - for_users - {"flexbatch"}
    wanted = re.compile(
        rf"""(?:import|from|find_spec\(["']|import_module\(["'])\s*({"|".join(map(re.escape, only_tests))})\b"""
    )
    files = [
        path for folder in ("flexbatch", "policy", "kernels", "apps") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert len(files) > 100
    assert not {
        str(path.relative_to(ROOT)): wanted.findall(path.read_text(encoding="utf-8"))
        for path in files
        if wanted.search(path.read_text())
    }
