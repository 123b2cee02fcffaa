"""Adapters in the commands: a column of a batch job, the model of an OpenAI request, one for all, jobs that go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.apps.batch import main, model_identity
from flexbatch.apps.completion import main as complete
from flexbatch.apps.ray import GenerateText
from flexbatch.cli.run_settings import RunConfig, SamplingConfig
from flexbatch.cli.run_work import make_work
from flexbatch.config import EngineConfig
from flexbatch.run import main as run
from tests.apps_batch.helpers import read_output, write_input
from tests.peft_folders import linear_modules, write_adapter
from tests.tiny_models import make_model

PROMPTS = ["def add(a, b):", "import os", "for i in range(", "class A:", "return x", "while True:"]
BLOCK = ("--device", "cpu", "--gpu-batch-size", "4", "--num-gpu-batches", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, two adapters, and greedy texts of every prompt with each and with none."""
    folder = tmp_path_factory.mktemp("lora")
    model = make_model("llama", folder / "model")
    for i, name in enumerate(("a", "b")):
        write_adapter(folder / name, model, linear_modules(model)[i::2], seed=i, strength=1.0)
    greedy = SamplingParams(max_tokens=5, temperature=0)
    with LLM(str(folder / "model"), lora={name: folder / name for name in "ab"}, device="cpu") as llm:
        texts = {
            name: [each.text for each in llm.generate(PROMPTS, greedy, lora_request=name)] for name in ("a", "b", None)
        }
    assert len(set(map(str, texts.values()))) == 3
    return folder, texts


def words_of(folder: Path, *names: str) -> list[str]:
    adapters = [f"{name}={folder / name}" for name in names]
    return ["--model", str(folder / "model"), "--max-tokens", "5", "--lora", *adapters, *BLOCK]


def test_a_column_names_the_adapter_of_each_row(models, tmp_path, capsys):
    folder, texts = models
    names = ["a", None, "b", "", "c", "a"]
    source = write_input(tmp_path / "in.parquet", PROMPTS, adapter=names)
    words = [str(source), str(tmp_path / "out"), *words_of(folder, "a", "b")]
    assert main([*words, "--lora-column", "adapter"]) == 3
    rows = read_output(tmp_path / "out").to_pylist()
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        if name == "c":
            assert "there is no adapter 'c'; known: a, b" in row["error"]
        else:
            assert row["generated_text"] == texts[name or None][i] and not row["error"]
    assert main([str(source), str(tmp_path / "other"), *words_of(folder, "a", "b")]) == 2
    assert "--lora names 2 adapters, and no row says which is its own: --lora-column" in capsys.readouterr().err
    assert main([*words[:2], "--model", str(folder / "model"), "--lora-column", "adapter", "--device", "cpu"]) == 2
    assert "--lora-column adapter names adapters, and none is given: add --lora NAME=FOLDER" in capsys.readouterr().err


def test_the_model_of_an_openai_request_chooses(models, tmp_path):
    folder, texts = models
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": name, "prompt": prompt, "temperature": 0},
        }
        for i, (prompt, name) in enumerate(
            zip(PROMPTS, ["a", "model", "b", "bb", None, str(folder / "model")], strict=True)
        )
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    assert main([str(tmp_path / "in.jsonl"), str(out), "--input-format", "openai", *words_of(folder, "a", "b")]) == 3
    answers = [json.loads(line) for path in sorted(out.glob("part-*")) for line in path.read_text().splitlines()]
    for i, answer in enumerate(answers):
        name = lines[i]["body"]["model"]
        if name == "bb":  # one that is misspelled is not answered by the model without it
            assert "the model 'bb' does not exist here; known: 'a', 'b', " in json.dumps(answer)
            continue
        body = answer["response"]["body"]
        assert body["choices"][0]["text"] == texts[name if name in ("a", "b") else None][i]
        assert body["model"] == (name or "")


def test_the_only_one_holds_for_all_rows(models, tmp_path, capsys):
    folder, texts = models
    source = write_input(tmp_path / "in.parquet", PROMPTS)
    assert main([str(source), str(tmp_path / "out"), *words_of(folder, "b")]) == 0
    assert read_output(tmp_path / "out")["generated_text"].to_pylist() == texts["b"]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = [*words_of(folder, "a"), "--prompts", str(tmp_path / "prompts.txt")]
    assert run([*words, "--output", str(tmp_path / "run.jsonl")]) == 0
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts["a"]
    assert run([*words[:4], *words_of(folder, "a", "b")[4:], "--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert "--lora names 2 adapters, and no row says which is its own: --lora-default" in capsys.readouterr().err
    assert complete([*words_of(folder, "b"), PROMPTS[0]]) == 0
    assert texts["b"][0] in capsys.readouterr().out
    assert run([*words_of(folder, "a")[:4], "--lora", f"a={folder / 'nowhere'}", "--prompts", str(source)]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_tables_of_ray_have_the_column(models):
    folder, texts = models
    settings = {"model": str(folder / "model"), "device": "cpu", "max_tokens": 5, "prompt_column": "prompt"}
    adapters = tuple(f"{name}={folder / name}" for name in "ab")
    with GenerateText(lora=adapters, lora_column="who", **settings) as processor:
        table = processor(pa.table({"prompt": PROMPTS[:2], "who": ["b", None]}))
    assert table["generated_text"].to_pylist() == [texts["b"][0], texts[None][1]]


def test_a_job_goes_on_only_with_the_adapters_that_it_began_with(models, tmp_path, capsys):
    """By their content: a copy elsewhere is the same, and one changed number is another job."""
    folder, texts = models
    copy = tmp_path / "copy"
    for name in ("model", "a"):
        shutil.copytree(folder / name, copy / name)
    source = write_input(tmp_path / "in.parquet", PROMPTS)
    assert main([str(source), str(tmp_path / "out"), *words_of(folder, "a"), "--limit", "6"]) == 0
    assert main([str(source), str(tmp_path / "out"), *words_of(copy, "a"), "--limit", "6"]) == 0
    config = json.loads((copy / "a" / "adapter_config.json").read_text())
    (copy / "a" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    assert main([str(source), str(tmp_path / "out"), *words_of(copy, "a"), "--limit", "6"]) == 2
    assert "lora" in capsys.readouterr().err
    assert read_output(tmp_path / "out")["generated_text"].to_pylist() == texts["a"]


def test_what_completions_depend_on(models, tmp_path):
    folder, _ = models
    (tmp_path / "p.txt").write_text("x")

    def facts(*names: str, **settings):
        lora = tuple(f"{name}={folder / name}" for name in names)
        engine = EngineConfig(
            model=str(folder / "model"), device="cpu", offload_dir=str(tmp_path), lora=lora, **settings
        )
        work = make_work(engine, RunConfig(prompts=str(tmp_path / "p.txt")), SamplingConfig())
        return json.dumps(work.facts(engine)), json.dumps(model_identity(engine))

    found = [facts(), facts("a"), facts("a", lora_default="a"), facts("a", "b", lora_default="a")]
    assert all(len(set(column)) == len(found) for column in zip(*found, strict=True))


def test_lm_eval_takes_one_for_all():
    pytest.importorskip("lm_eval")
    from flexbatch.apps.lm_eval_settings import engine_arguments

    found = engine_arguments({"lora": "sql=adapters/sql", "device": "cpu"})
    assert found == {"lora": ("sql=adapters/sql",), "lora_default": "sql", "device": "cpu"}
