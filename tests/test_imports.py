"""The direction of imports (docs/architecture.md): apps -> flexbatch -> policy, kernels; inside flexbatch never
upward; no torch for ``--help``."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = ("policy", "kernels")
# Lowest first. Modules on the same level may import each other; `config`, `request` and `trace` are at the bottom.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("files", "validation"),
    ("config", "request", "trace", "parallel"),
    ("models",),
    ("memory", "text"),
    ("execution",),
    ("speculative",),
    ("calibrate",),
    ("planner",),
    ("intake",),
    ("loop",),
    ("jobs",),
    ("engine",),
    ("cli",),
    ("run",),
    ("apps",),
    ("__main__",),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def sources() -> list[Path]:
    """Each file once, by its real path, not through the links in flexbatch/."""
    return sorted(
        {path.resolve() for folder in ("flexbatch", "apps", *LEAVES) for path in (ROOT / folder).rglob("*.py")}
    )


def imported(path: Path) -> set[str]:
    """Full names of the modules that the file imports, anywhere in it, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write the full name"
            assert node.module is not None
            names.update(
                [node.module] if node.module != "flexbatch" else [f"flexbatch.{alias.name}" for alias in node.names]
            )
    return names


def package_of(name: str) -> str:
    """The package of a module, or the module itself at the top; public names count as where they are defined."""
    part = name.split(".")[1] if "." in name else ""
    return {"LLM": "engine", "Completion": "request", "SamplingParams": "request"}.get(part, part)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    here = parts[0] if parts[0] in ("apps", *LEAVES) else parts[1]
    for name in imported(path):
        top = name.split(".")[0]
        assert top not in ("apps", *LEAVES), f"{path}: import {name} by its one name, flexbatch.{name}"
        assert top not in ("benchmark", "tests"), f"{path} imports {name}, which is not installed"
        if top != "flexbatch" or name == "flexbatch.__version__":
            continue
        there = package_of(name)
        if here in LEAVES:
            assert there == here, f"{path}: {here} is a leaf and may not import {name}"
        elif there not in LEAVES and here != "__init__":
            assert there in LEVEL_OF, f"{name} has no level; put it into LEVELS"
            assert here in LEVEL_OF, f"{here} has no level; put it into LEVELS"
            assert LEVEL_OF[there] <= LEVEL_OF[here], f"{path}: {here} may not import {name}, which is above it"


def test_policy_takes_plain_numbers() -> None:
    """torch only where hardware is measured."""
    for path in sorted((ROOT / "policy").rglob("*.py")):
        if "profile" not in path.relative_to(ROOT).as_posix():
            assert not {name.split(".")[0] for name in imported(path)} & {"torch", "transformers"}, path


def test_kernels_stay_a_namespace_folder() -> None:
    """A regular package ``kernels`` in the working directory would hide Hugging Face's, which transformers imports."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", ("apps", "kernels", "policy"))
def test_links_are_committed(name: str) -> None:
    link = ROOT / "flexbatch" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


@pytest.mark.parametrize(
    "module",
    (
        "flexbatch",
        "flexbatch.run",
        "flexbatch.apps.batch",
        "flexbatch.apps.serve",
        "flexbatch.apps.wrangle",
        "flexbatch.apps.inspect_model",
    ),
)
def test_help_answers_without_torch(module: str) -> None:
    code = (
        f"import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        f"finally:\n    assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "flexbatch" else ("flexbatch", *parts)).removesuffix(".__init__")


def imported_at_once(path: Path, known: Collection[str]) -> set[str]:
    """The modules that importing the file imports: not those inside functions or under TYPE_CHECKING."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # `from package import module`, or a name of the package's own file.
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts & set(known) or {node.module}
        pending += ast.iter_child_nodes(node)
    return found & set(known)


def test_no_module_imports_itself_through_others() -> None:
    files = {module_name(path): path for path in sources()}
    graph = {name: imported_at_once(path, files.keys()) - {name} for name, path in files.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' <- '.join(error.args[1])}")
    assert set(order) >= files.keys()


def test_a_class_name_means_one_thing() -> None:
    """Two classes of one name, as `Request` in the engine and in the cost model, make a reader open both files."""
    owners: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                owners.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in owners.items() if len(files) > 1}
