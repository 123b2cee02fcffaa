"""The adapter against the harness's own ``hf`` model, request by request, over every request type."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

lm_eval = pytest.importorskip("lm_eval")  # the extra flexbatch[lm-eval]

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval_tasks import write_tasks  # noqa: E402
from oracle import OracleLLM, make_model, make_pieces  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from flexbatch.apps.lm_eval_model import FlexBatchLM  # noqa: E402
from flexbatch.apps.lm_eval_settings import engine_arguments  # noqa: E402
from flexbatch.models.generation_config import GenerationDefaults  # noqa: E402
from flexbatch.models.resolve import DEMO  # noqa: E402
from flexbatch.validation.errors import ConfigurationError  # noqa: E402
from tests.grids import grid  # noqa: E402
from tests.processes import Forked  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ENGINE = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return write_tasks(folder, 6), TaskManager(include_path=str(folder), include_defaults=False)


def responses(model, tasks, **options):
    """task -> responses of every request, in the order of documents, and the metrics."""
    names, manager = tasks
    found = lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    samples = {
        name: [response for doc in sorted(docs, key=lambda d: d["doc_id"]) for response in doc["resps"]]
        for name, docs in found["samples"].items()
    }
    return samples, found["results"]


def hugging_face(folder, batch_size: int = 4, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size, **options)


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys() and all(theirs.values())
    for name in theirs:
        for ours, reference in zip(mine[name], theirs[name], strict=True):
            if isinstance(reference[0], str):
                assert ours == reference, name
            elif isinstance(reference[0], tuple | list):
                assert ours[0][0] == pytest.approx(reference[0][0], abs=1e-4), name
                assert ours[0][1] == reference[0][1], name
            else:  # the sum over a page of hundreds of tokens
                assert ours[0] == pytest.approx(reference[0], rel=1e-6, abs=1e-4), name


@pytest.mark.parametrize("chat", [False, True])
def test_all_request_types_equal_hf(chat, tiny, tiny_chat, tasks):
    """On the engine, with a block smaller than the job, chunked prompts, and pages longer than the context."""
    folder = tiny_chat if chat else tiny
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True} if chat else {}
    theirs, their_metrics = responses(hugging_face(folder), tasks, **options)
    model = FlexBatchLM(
        str(folder), prefill_chunk=96, gpu_batch_size=4, num_gpu_batches=2, percent="100 0 50 50 100 0", **ENGINE
    )
    mine, my_metrics = responses(model, tasks, **options)
    model.llm.close()
    assert_equal(mine, theirs)
    for name, metrics in their_metrics.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert my_metrics[name][metric] == pytest.approx(value, rel=1e-4), (name, metric)


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=number) for number, each in enumerate(arguments)]


@pytest.fixture
def model(tiny):
    return FlexBatchLM(str(tiny), llm=OracleLLM(tiny))


def test_equal_requests_are_computed_once_and_in_one_block(model):
    found = model.loglikelihood(
        requests("loglikelihood", *[("red ale", " dark"), ("red", " ale dark"), ("red ale", " dark"), ("x", " y")])
    )
    assert model.llm.batches == [2], "context + continuation is the same text three times"
    assert found[0] == found[2] and found[0][0] > found[1][0]


def test_greedy_continuations_are_known_as_such(model):
    context = "Question: which letter?"
    ids = model.llm.generate([context], model._sampling_params(0, {"max_gen_toks": 3}))[0].token_ids
    tokens = model.tok_encode(context)
    greedy, other = model._loglikelihood_tokens([(None, tokens, ids), (None, tokens, [*ids[:2], (ids[2] + 1) % 300])])
    assert greedy[1] is True and other[1] is False


def test_a_written_bos_is_not_doubled_and_long_contexts_lose_their_left_end(model, tiny_chat):
    chat = FlexBatchLM(str(tiny_chat), llm=OracleLLM(tiny_chat))
    assert chat.tok_encode("<s>red ale") == chat.tok_encode("red ale") and chat.tok_encode("red ale").count(0) == 1
    context, kept = "red ale. " * 300, 256 - 6
    (text,) = model.generate_until(requests("generate_until", (context, {"max_gen_toks": 6, "until": []})))
    (expected,) = model.llm.generate(
        [model.tok_encode(context)[-kept:]], model._sampling_params(0, {"max_gen_toks": 6})
    )
    assert text == model.tokenizer.decode(expected.token_ids, skip_special_tokens=True)


OPTIONS = [
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"prefix_token_id": 77},
    {"add_bos_token": True, "prefix_token_id": 77},
    {"max_length": 60},
    {"truncation": True, "add_bos_token": True},
    {"think_end_token": "e"},
    {"think_end_token": "66"},
    {"enable_thinking": False},
]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A Llama with a SentencePiece tokenizer, which drops the first space of what it decodes and adds no BOS by
    itself."""
    return make_model(tmp_path_factory.mktemp("tiny") / "pieces", seed=2, positions=256, tokenizer=make_pieces())


@pytest.mark.parametrize(("which", "options"), grid(("pieces", "tiny", "tiny_chat"), OPTIONS), ids=str)
def test_tokenizer_options_are_those_of_hf(which, options, request):
    folder = request.getfixturevalue(which)
    theirs = hugging_face(folder, batch_size=1, **options)
    mine = FlexBatchLM(str(folder), llm=OracleLLM(folder), **options)
    bos = theirs.tokenizer.bos_token
    pairs = [
        ("red ale", " dark"),
        ("", "dark ale"),
        (f"{bos}red", " ale"),
        ("The quick brown ", "fox"),
        (theirs.tokenizer.decode(77) + "ale", " B"),
    ]
    for text in (*(context for context, _ in pairs), "red ale dark " * 40):
        assert mine.tok_encode(text) == theirs.tok_encode(text)
        assert mine.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)
    for (ours, greedy), (reference, wanted) in zip(
        mine.loglikelihood(requests("loglikelihood", *pairs)),
        theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True),
        strict=True,
    ):
        assert ours == pytest.approx(reference, abs=1e-4) and greedy == wanted
    texts = [("The quick brown fox",), (f"{bos}red ale " * 30,)]
    rolling = [
        each.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
        for each in (mine, theirs)
    ]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-6, abs=1e-4)
    asked = [(context or "A", {"until": ["zz", "</s>"], "max_gen_toks": 12}) for context, _ in pairs] + [
        ("red ale " * 60, {"max_gen_toks": 8})
    ]
    generated = [each.generate_until(requests("generate_until", *asked), disable_tqdm=True) for each in (mine, theirs)]
    assert generated[0] == generated[1]


@pytest.mark.parametrize("which", ["tiny", "pieces"])
def test_until_sees_special_tokens_and_spaces_at_the_start(which, request):
    """The engine itself, against a model that is made to say the tokens of the stop string."""
    folder = request.getfixturevalue(which)
    with_engine = FlexBatchLM(str(folder), percent="100 0 100 0 100 0", gpu_batch_size=4, num_gpu_batches=1, **ENGINE)
    with with_engine.llm as llm:
        said = {"until": [], "max_gen_toks": 6}
        (token,) = set(llm.tokenizer.convert_tokens_to_ids(["<|im_end|>"]))
        params = with_engine._sampling_params(0, said)
        whole = llm.generate(["red ale"], params)[0]
        forced = dataclasses.replace(params, logit_bias={token: 1e4}, stop=("<|im_end|>",))
        found = llm.generate(["red ale"], forced)[0]
        assert (found.text, found.token_ids, found.stop_reason, found.finish_reason) == (
            "",
            [token],
            "<|im_end|>",
            "stop",
        )
        assert with_engine._answer(found, ["<|im_end|>"]) == ""
        first = whole.text[:3]
        cut = with_engine.generate_until(
            requests("generate_until", ("red ale", {"until": [first], "max_gen_toks": 6})), disable_tqdm=True
        )
        assert cut == [""]


def test_thinking_is_for_generation_and_needs_its_end(tiny):
    with pytest.raises(ConfigurationError, match="enable_thinking needs think_end_token"):
        FlexBatchLM(str(tiny), llm=OracleLLM(tiny), enable_thinking=True)
    thinking = FlexBatchLM(str(tiny), llm=OracleLLM(tiny), enable_thinking=True, think_end_token="</think>")
    assert thinking.chat_template_args == {"enable_thinking": True}
    with pytest.raises(ValueError, match="enable_thinking is for tasks that generate"):
        thinking.loglikelihood(requests("loglikelihood", ("a", "b")))


def test_generation_options_are_passed_on_or_refused(model):
    params = model._sampling_params(
        0, {"until": "x", "do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_tokens": 7}
    )
    assert (params.stop, params.temperature, params.top_p, params.max_tokens) == (("x",), 0.5, 0.9, 7)
    assert model._sampling_params(0, {"do_sample": False, "temperature": 0.5}).greedy
    assert params.top_k == GenerationConfig._get_default_generation_params()["top_k"]
    drawn = {"do_sample": True, "temperature": 0.5}
    assert [model._sampling_params(0, {**drawn, "top_k": k}).top_k for k in (0, 7)] == [0, 7]
    assert model._sampling_params(0, {"top_k": 7}).top_k == 7
    told = SimpleNamespace(generation=GenerationDefaults("f", {"top_k": 9, "do_sample": True}))
    model.llm, whole = told, model.llm
    assert [model._sampling_params(0, {**drawn, **more}).top_k for more in ({}, {"top_k": 3})] == [9, 3]
    told.generation = GenerationDefaults("f", {}, {"num_beams": 4})
    assert model._sampling_params(0, {"num_beams": 1}).greedy
    with pytest.raises(ValueError, match="f asks for num_beams=4"):
        model._sampling_params(0, {})
    model.llm = whole
    beams = {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 0.5, "early_stopping": True}
    assert model._sampling_params(0, {**beams, "typical_p": 1.0, "dola_layers": None}) == model._sampling_params(0, {})
    with pytest.raises(ValueError, match=r"request 3: generation options \['num_return_sequences'\] are not available"):
        model._sampling_params(3, {"num_return_sequences": 2})
    with pytest.raises(ValueError, match=r"request 3: generation options \['num_beams'\] are not available"):
        model._sampling_params(3, {"num_beams": 4})


def test_what_cannot_be_run_is_told(model):
    with pytest.raises(ValueError, match="cannot be scored"):
        model._loglikelihood_tokens([(None, [1], [])])
    with pytest.raises(ValueError, match="max_gen_toks=256 leaves no room"):
        model.generate_until(requests("generate_until", ("x", {"max_gen_toks": 256})))
    model._max_length = 400  # the adapter believes in more context than the model has
    with pytest.raises(RuntimeError, match="1 of 2 loglikelihood requests failed; the first: the prompt has"):
        model.loglikelihood(requests("loglikelihood", ("fine", " red"), ("y" * 300, " dark")))


def test_engine_arguments_from_a_command_line():
    given = engine_arguments(
        {"percent": "20 80 0 100 50 50", "draft": "small medium", "gpu_batch_size": 4, "device": None}
    )
    assert given == {"percent": (20.0, 80.0, 0.0, 100.0, 50.0, 50.0), "draft": ("small", "medium"), "gpu_batch_size": 4}


@pytest.mark.parametrize("cuda", [False, True])
def test_the_harness_device_is_taken_where_it_is(monkeypatch, cuda):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert engine_arguments({"device": "cuda:0"}) == ({"device": "cuda:0"} if cuda else {})
    assert engine_arguments({"device": "cpu"}) == {"device": "cpu"}


def test_arguments_of_hf_are_taken_where_they_change_nothing():
    assert engine_arguments(
        {"trust_remote_code": False, "revision": "main", "parallelize": False, "gpu_batch_size": 2}
    ) == {"gpu_batch_size": 2}
    assert engine_arguments({"tokenizer": "other"}) == {"tokenizer": "other"}
    for name, value in (("trust_remote_code", True), ("revision", "v2"), ("peft", "lora")):
        with pytest.raises(ConfigurationError, match=f"FlexBatch has no {name}"):
            engine_arguments({name: value})


@pytest.mark.slow  # 15 s each, to import the harness and a model
@pytest.mark.parametrize(
    ("arguments", "told"),
    [("pretrained=demo,percnt=1", "FlexBatch has no percnt"), ("pretrained=no/where", "model 'no/where'")],
)
def test_mistakes_in_model_args_are_exit_code_2_without_a_traceback(tmp_path, arguments, told):
    words = ["lm-eval", "run", "--model", "flexbatch", "--model_args", arguments]
    words += ["--tasks", *write_tasks(tmp_path, 2)[:1], "--include_path", str(tmp_path)]
    process = Forked("flexbatch", words, {"HF_HUB_OFFLINE": "1"})
    output = "".join(process.communicate(timeout=300))
    assert process.returncode == 2 and told in output and "Traceback" not in output, output


@pytest.mark.slow
def test_the_command_equals_hf_caches_and_is_timed(tiny, tmp_path):
    """``lm_eval run`` as a user types it, for both models; the second FlexBatch run is answered by --use_cache."""
    names = write_tasks(tmp_path, 40)
    common = ["--tasks", *names, "--include_path", str(tmp_path), "--log_samples", "--device", "cpu"]

    def run(module: str, model: str, output: str, *options: str) -> float:
        began = time.perf_counter()
        arguments = f"pretrained={tiny},dtype=float32"
        command = [
            sys.executable,
            "-m",
            module,
            "run",
            "--model",
            model,
            "--model_args",
            arguments,
            *common,
            "--output_path",
            str(tmp_path / output),
            *options,
        ]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, cwd=tmp_path, timeout=900
        )
        assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout[-4000:]
        return time.perf_counter() - began

    def logged(output: str) -> dict[str, list]:
        found = {}
        for path in (tmp_path / output).glob("*/samples_*.jsonl"):
            docs = sorted(map(json.loads, path.read_text().splitlines()), key=lambda doc: doc["doc_id"])
            found[path.name.split("_20")[0]] = [[number(value) for value in flatten(doc["resps"])] for doc in docs]
        return found

    theirs = run("lm_eval", "hf", "hf", "--batch_size", "8")
    mine = run("flexbatch.apps.lm_eval", "flexbatch", "mine", "--use_cache", str(tmp_path / "cache"))
    again = run("flexbatch.apps.lm_eval", "flexbatch", "again", "--use_cache", str(tmp_path / "cache"))
    reference = logged("hf")
    assert len(reference) == len(names)
    for output in ("mine", "again"):
        for name, docs in logged(output).items():
            for ours, expected in zip(docs, reference[name], strict=True):
                texts = [value for value in expected if isinstance(value, str)]
                assert [value for value in ours if isinstance(value, str)] == texts, name
                numbers = [value for value in expected if not isinstance(value, str)]
                assert [value for value in ours if not isinstance(value, str)] == pytest.approx(
                    numbers, rel=1e-6, abs=1e-4
                ), name
    print(f"hf {theirs:.1f} s, flexbatch {mine:.1f} s (ratio {theirs / mine:.2f}), from the cache {again:.1f} s")


def flatten(value):
    return [value] if not isinstance(value, list) else [each for item in value for each in flatten(item)]


def number(text):
    """The harness logs numbers and truth values as text."""
    try:
        return float({"True": 1, "False": 0}.get(str(text), text))
    except ValueError:
        return text


GENERATION = (
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {
        "suppress_tokens": [40, 50, 60],
        "min_new_tokens": 4,
        "bad_words_ids": [[41], [42, 43]],
        "temperature": 0.3,
        "top_k": 4,
        "do_sample": True,
    },
    {"max_new_tokens": 5, "sequence_bias": [[[45], 3.0], [[45, 46], 4.0]]},
)


@pytest.mark.parametrize("content", GENERATION, ids=lambda content: ",".join(content))
def test_generate_until_follows_the_models_generation_config_as_hf(content, tiny, tmp_path):
    """Greedy answers, request by request: the file's settings count for both, and what a request says itself comes
    before them."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **content}))
    asked = requests(
        "generate_until",
        ("def main(", {"until": ["zzz"], "max_gen_toks": 12}),
        ("import os, sys", {"until": [], "max_gen_toks": 9, "do_sample": False}),
        ("x = 1", {"until": ["zzz"], "max_gen_toks": 8, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3}),
    )
    model = FlexBatchLM(str(folder), gpu_batch_size=4, num_gpu_batches=1, percent="100 0 100 0 100 0", **ENGINE)
    mine = model.generate_until(asked, disable_tqdm=True)
    model.llm.close()
    assert mine == hugging_face(folder, 1).generate_until(asked, disable_tqdm=True)
    plain = FlexBatchLM(str(tiny), gpu_batch_size=4, num_gpu_batches=1, percent="100 0 100 0 100 0", **ENGINE)
    assert plain.generate_until(asked, disable_tqdm=True) != mine, "this file changes nothing here and proves nothing"
    plain.llm.close()


def test_several_stops_in_one_token_cut_as_hf_does():
    """One after the other, in the order of ``until``, not by their places in the text."""
    context = "def main():\n    "
    mine = FlexBatchLM("demo", percent="100 0 100 0 100 0", gpu_batch_size=8, num_gpu_batches=1, **ENGINE)
    with mine.llm:
        (text,) = mine.generate_until(requests("generate_until", (context, {"until": [], "max_gen_toks": 8})), True)
        pairs = [[text[index], text[index - 1 : index + 2]] for index in range(1, len(text) - 1, 2)]
        asked = [(context, {"until": until, "max_gen_toks": 8}) for pair in pairs for until in (pair, pair[::-1])]
        found = mine.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert found == hugging_face(DEMO, 1).generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert len(set(found)) > 2


def test_the_documentation_says_which_releases_need_our_command() -> None:
    """Stock lm_eval finds the model by its entry point, or it is a release that the documentation names."""
    import importlib.metadata

    import lm_eval.api.registry as registry

    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    version = importlib.metadata.version("lm_eval")
    assert hasattr(registry, "load_plugins") or f"No release up to {version} does" in text
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text()
    assert "lm_eval.models =\n    flexbatch = flexbatch.apps.lm_eval_model:FlexBatchLM" in setup
