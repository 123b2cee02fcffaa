"""Meshes of forked processes that run many engines in one go."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.processes import Forked
from tests.tiny_models import make_model, random_prompts

MIXED = (30, 40, 40, 30, 50, 50)
"""Weights, cache and activations on all tiers."""
PROMPTS = random_prompts([1, 5, 33, 70, 17, 40], seed=3)
GREEDY = {"max_tokens": 9, "temperature": 0, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def engine(folder: Path, family: str, sizes: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """An engine of `driver` over a model that is made in ``folder``."""
    name = f"{family}-{len(list(folder.iterdir()))}"
    make_model(family, folder / name, **(sizes or {}))
    settings = {
        "percent": MIXED,
        "gpu_batch_size": 2,
        "num_gpu_batches": 2,
        "prefill_chunk": 16,
        "offload_dir": str(folder / f"{name}-disk"),
        **fields.pop("settings", {}),
    }
    if "tree" in settings and "draft" not in settings:
        settings["draft"] = [str(folder / name)]  # whose best guess is always accepted: paths through trees are long
    prompts = fields.pop("prompts", PROMPTS)
    params = fields.pop("params", [GREEDY] * len(prompts))
    return {"model": str(folder / name), "prompts": prompts, "params": params, "settings": settings, **fields}


def start(folder: Path, size: int, engines: list[dict[str, Any]]) -> list[Forked]:
    """The ranks of a mesh, which run the engines."""
    file, address = folder / f"engines-{size}.json", f"127.0.0.1:{free_port()}"
    file.write_text(json.dumps(engines))
    return [Forked("tests.parallel.driver", [str(rank), str(size), address, str(file)]) for rank in range(size)]


def results(folder: Path, ranks: list[Forked], seconds: float = 300) -> list[dict[str, Any]]:
    """What every engine generated, once all ranks have ended well, each within so many seconds."""
    said = [rank.communicate(seconds)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(said)
    return json.loads((folder / f"engines-{len(ranks)}.results").read_text())
