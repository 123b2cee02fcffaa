"""A small byte-level BPE tokenizer, made on the spot: every byte is a token, so that random ids cut characters
anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import train_tokenizer

TEMPLATE = """{{ bos_token }}{% for m in messages -%}
{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif -%}
{% if not loop.first %}{{ '\\n' }}{% endif %}[{{ m['role'] }}] {{ m['content'] }}{% endfor -%}
{% if add_generation_prompt %}{{ '\\n' }}[assistant] {% endif %}"""


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = ["def add(x, y):\n    return x + y\n", "stop here, stop there", "größer 漢字 🙂 naïve"]
    folder = tmp_path_factory.mktemp("tokenizer")
    options = {"chat_template": TEMPLATE, "model_max_length": 50}
    train_tokenizer(corpus * 3, 320, ["<s>", "</s>"], bos=True, **options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path):
    from flexbatch.models.resolve import load_tokenizer

    return load_tokenizer(tokenizer_folder)
