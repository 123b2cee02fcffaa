"""The adapter against the harness's own ``hf`` model, request by request, over every request type."""

from __future__ import annotations

import pytest

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager
from lm_eval_tasks import write_tasks
from oracle import OracleLLM

from flexbatch.apps.lm_eval_model import FlexBatchLM, engine_arguments


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return write_tasks(folder, 6), TaskManager(include_path=str(folder), include_defaults=False)


def responses(model, tasks, **options):
    """task -> responses of every request, in the order of documents, and the metrics."""
    names, manager = tasks
    found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options)
    samples = {name: [response for doc in sorted(docs, key=lambda d: d["doc_id"]) for response in doc["resps"]] for name, docs in found["samples"].items()}
    return samples, found["results"]


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys() and all(theirs.values())
    for name in theirs:
        for ours, reference in zip(mine[name], theirs[name], strict=True):
            if isinstance(reference[0], str):
                assert ours == reference, name
            elif isinstance(reference[0], tuple | list):
                assert ours[0][0] == pytest.approx(reference[0][0], abs=1e-4), name
                assert ours[0][1] == reference[0][1], name
            else:
                assert ours[0] == pytest.approx(reference[0], abs=1e-4 * max(1, abs(reference[0]) / 100)), name


@pytest.mark.parametrize("chat", [False, True])
def test_all_request_types_equal_hf(chat, tiny, tiny_chat, tasks):
    from lm_eval.models.huggingface import HFLM

    folder = str(tiny_chat if chat else tiny)
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True} if chat else {}
    theirs, their_metrics = responses(HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4), tasks, **options)
    mine, my_metrics = responses(FlexBatchLM(folder, llm=OracleLLM(folder)), tasks, **options)
    assert_equal(mine, theirs)
    for name, metrics in their_metrics.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert my_metrics[name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
