"""Where compiled kernels lie: nothing is loaded that is damaged or could be somebody else's."""

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from flexbatch.kernels import native, native_cache

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")

QUICK = (*native.FLAGS, "-O0")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One compiled library, which the tests copy; unoptimized, in a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FLAGS", QUICK)
        return native.build(tmp_path_factory.mktemp("built"))


@pytest.fixture
def cache(tmp_path, built, monkeypatch):
    """A cache folder with the library; compiling again is copying, and counted."""
    compiled = []

    def compile_again(compiler, sources, folder, key):
        compiled.append(folder)
        fresh = folder / "fresh"
        fresh.write_bytes(built.read_bytes())
        return native_cache.put(folder, key, fresh)

    monkeypatch.setattr(native, "_compile", compile_again)
    folder = tmp_path / "cache"
    native.build(folder)
    assert len(compiled) == 1
    compiled.clear()
    return folder, compiled


def test_the_folder_is_this_users_alone_and_what_is_in_it_is_used_again(cache):
    folder, compiled = cache
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert native.build(folder).is_absolute() and not compiled


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def alter(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def extend(file):
    with file.open("ab") as stream:
        stream.write(b"more")


def link(file):
    file.rename(file.parent / "elsewhere")
    file.symlink_to(file.parent / "elsewhere")


def dangle(file):
    file.unlink()
    file.symlink_to("/nowhere")


def write_for_all(file):
    file.chmod(0o777)


def pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    "spoil", [truncate, empty, alter, extend, link, dangle, write_for_all, pipe], ids=lambda spoil: spoil.__name__
)
def test_a_library_that_is_not_what_was_compiled_is_compiled_again(cache, built, spoil):
    folder, compiled = cache
    (library,) = folder.glob("*.so")
    spoil(library)
    again = native.build(folder)
    assert len(compiled) == 1 and again.read_bytes() == built.read_bytes() and not again.is_symlink()
    assert stat.S_IMODE(again.stat().st_mode) == 0o700
    native.build(folder)
    assert len(compiled) == 1, "and then used"


def test_a_planted_library_with_a_digest_in_its_name_is_not_loaded_from_a_folder_that_others_can_write(cache):
    folder, compiled = cache
    folder.chmod(0o777)
    native.build(folder)
    assert len(compiled) == 1 and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_is_left_alone(cache, monkeypatch):
    folder, compiled = cache
    monkeypatch.setattr(native_cache.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(
        native.BuildError, match=rf"{folder} belongs to user {os.getuid()}, not to user {os.getuid() + 1}; remove it"
    ):
        native.build(folder)
    assert not compiled


@pytest.mark.parametrize("target", ["folder", "nothing", "file"])
def test_a_folder_that_is_a_link_or_a_file_is_left_alone(cache, target):
    folder, _ = cache
    other = folder.with_name("other")
    other.write_text("") if target == "file" else other.symlink_to(folder if target == "folder" else "/nowhere")
    with pytest.raises(native.BuildError, match=rf"{other} is a (symbolic link|file), not a folder; remove it"):
        native.build(other)


def test_without_a_folder_to_trust_the_process_compiles_for_itself(tmp_path, cache):
    _, compiled = cache
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = native._load(link)
    assert loaded.flexbatch_paged_attention and len(compiled) == 1
    assert [str(warning.message) for warning in seen] == [
        "the kernels for CPU attention were compiled for this process alone, as at every start: compiled "
        "kernels are not kept where they could be another "
        f"user's: {link} is a symbolic link, not a folder; remove it"
    ]
    assert not compiled[0].exists() and list(tmp_path.glob("*.so")) == []


@pytest.mark.parametrize("home", ["~", "relative", ""])
def test_without_a_home_the_folder_is_absolute(home, monkeypatch, tmp_path):
    monkeypatch.setattr(os.path, "expanduser", lambda path: home)
    monkeypatch.chdir(tmp_path)
    folder = native_cache.user_cache_folder("native")
    assert folder.is_absolute() and str(os.geteuid()) in str(folder) and tmp_path not in folder.parents
    monkeypatch.setattr(os.path, "expanduser", lambda path: str(tmp_path))
    assert native_cache.user_cache_folder("native").is_relative_to(tmp_path)


def test_processes_that_compile_at_once_agree(tmp_path):
    code = (
        f"import sys, pathlib; from flexbatch.kernels import native; native.FLAGS = {QUICK}; "
        "print(native.build(pathlib.Path(sys.argv[1])))"
    )
    starts = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {Path(start.communicate()[0].strip()) for start in starts}
    assert all(start.returncode == 0 for start in starts)
    assert all(native_cache.find(path.parent, path.stem.rpartition("-")[0]) for path in paths)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".so"}, "no temporary files stay"
