"""What a layer adds to the hidden states is added up by the norm of the next one, where they stay on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.kernels import ops
from tests.tiny_models import make_model, random_prompts

PARAMS = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.mark.parametrize(
    ("family", "norm", "percent", "summed"),
    [
        ("llama", "rms_norm", (100, 0, 100, 0, 100, 0), True),
        ("llama", "rms_norm", (0, 100, 0, 100, 100, 0), True),
        ("llama", "rms_norm", (100, 0, 100, 0, 50, 50), False),
        ("opt", "layer_norm", (100, 0, 100, 0, 100, 0), True),
        ("opt-postnorm", "layer_norm", (100, 0, 100, 0, 100, 0), False),
    ],
)
@pytest.mark.parametrize("batches", [1, 2])
def test_norms_add_up_what_layers_leave_apart(
    family: str, norm: str, percent: tuple[int, ...], summed: bool, batches: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first norm of a model and the one of its head have nothing to add, all others have."""
    make_model(family, tmp_path / "model")
    settings: dict[str, Any] = {"gpu_batch_size": 3, "num_gpu_batches": batches, "offload_dir": str(tmp_path / "off")}
    job = random_prompts([5, 9, 3, 30, 17, 8], seed=1)
    plain, adding = getattr(ops, norm), []

    def noted(*args: Any, residual: Any = None, **more: Any) -> Any:
        adding.append(residual is not None)
        return plain(*args, residual=residual, **more)

    with LLM(str(tmp_path / "model"), percent=percent, **settings) as llm:
        llm.generate(job, PARAMS)
        monkeypatch.setattr(ops, norm, noted)
        wanted = [each.token_ids for each in llm.generate(job, PARAMS, first_index=0)]
        layers = llm.arch.num_layers
    norms = 2 * layers + bool(family != "opt-postnorm")
    calls, rest = divmod(len(adding), norms)
    assert calls and not rest
    each = 2 * layers - 1 if summed else 2 * layers if family == "opt-postnorm" else layers
    assert sum(adding) == calls * each
    assert all(len(tokens) == 5 for tokens in wanted)
