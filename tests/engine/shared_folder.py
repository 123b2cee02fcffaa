"""Starts of engines by pairs on one offload folder, each as process 1 of a namespace of its own: two containers that
share a volume.

    python -m tests.engine.shared_folder FOLDER STARTS MODEL MODEL

Prints for every pair the models, the exit codes, and the tokens where both are 0; by turns both are of the first model.
A torch that is imported once and forked makes a start cost tenths of a second.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch

from flexbatch import LLM, SamplingParams
from flexbatch.policy.hardware import load_hardware
from tests.tiny_models import random_prompts

CLONE_NEWPID = 0x20000000
PROMPTS = random_prompts([40, 3, 70], seed=2)
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
SETTINGS = {"device": "cpu", "gpu_memory": "1GiB", "cpu_memory": "1GiB", "gpu_batch_size": 2, "num_gpu_batches": 2}
ON_DISK = (0, 30, 0, 0, 20, 30)


def tokens(model: str, folder: str) -> list[list[int]]:
    """Of weights, cache and activations on the disk tier, in two jobs."""
    with LLM(model, offload_dir=folder, percent=ON_DISK, weight_bits=8, **SETTINGS) as llm:
        first = [list(completion.token_ids) for completion in llm.generate(PROMPTS[:2], GREEDY)]
        again = [list(completion.token_ids) for completion in llm.generate(PROMPTS, GREEDY)]
        llm.weights.check()
    assert again[:2] == first
    return again


def container(model: str, folder: str, output: Path, start: int) -> int:
    """Fork a process that is the first of a new namespace; ``start``: a pipe that is closed when both may begin."""
    helper = os.fork()
    if helper:
        return helper
    code = 9
    try:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWPID):
            os._exit(77)
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
        assert os.getpid() == 1
        os.read(start, 1)
        output.write_text(json.dumps(tokens(model, folder)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    folder, starts, (one, two) = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for number in range(starts):
        if number % 3 == 0:
            # The next two meet the files of this one.
            shutil.rmtree(folder / "offload", ignore_errors=True)
        models = (one, two) if number % 2 else (one, one)
        outputs = [folder / f"tokens-{rank}" for rank in range(2)]
        begin, go = os.pipe()
        offload = str(folder / "offload")
        helpers = [container(model, offload, out, begin) for model, out in zip(models, outputs, strict=True)]
        os.write(go, b"xx")
        codes = [os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]) for helper in helpers]
        os.close(begin)
        os.close(go)
        found = [json.loads(output.read_text()) for output in outputs] if not any(codes) else None
        print(json.dumps([models, codes, found]), flush=True)


if __name__ == "__main__":
    import flexbatch.calibrate.machine

    flexbatch.calibrate.machine.this_machine = lambda *arguments, **options: load_hardware("cpu")
    # Everything that a start imports, once; no thread of an operation may live when the process forks.
    torch.set_num_threads(1)
    tokens(sys.argv[3], str(Path(sys.argv[1]) / "alone"))
    main()
