"""Makes libraries noisy, in processes that have this folder on PYTHONPATH: each prints in every way when it is
imported, and at exit."""

import atexit
import ctypes
import importlib.abc
import importlib.util
import os
import subprocess
import sys

NOISY = {"numpy", "scipy.optimize", "torch", "transformers", "tokenizers", "yaml", "pyarrow", "datasets", "lm_eval"}
C = ctypes.CDLL(None)
STDOUT = sys.stdout


def make_noise(when):
    print(f"NOISE print {when}")
    sys.stdout.write(f"NOISE write {when}\n")
    if sys.__stdout__ is not None:
        sys.__stdout__.write(f"NOISE __stdout__ {when}\n")
    if STDOUT is not None:
        STDOUT.write(f"NOISE stdout of the start {when}\n")
    os.write(1, f"NOISE descriptor {when}\n".encode())
    C.printf(b"NOISE printf %s\n", when.encode())  # stays in C's buffer until exit, as stdout is no terminal
    subprocess.run(["echo", f"NOISE child {when}"], check=False)


class Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets the others find, and has their loader make a noise."""

    def find_spec(self, name, path=None, target=None):
        if name not in NOISY:
            return None
        NOISY.discard(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def noisily(module):
                make_noise(f"importing {name}")
                execute(module)
                atexit.register(make_noise, f"leaving {name}")

            spec.loader.exec_module = noisily
        return spec


sys.meta_path.insert(0, Finder())
