"""A small byte-level BPE tokenizer, made on the spot: every byte is a token, so that random ids cut characters
anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif -%}
{% if not loop.first %}{{ '\\n' }}{% endif %}[{{ m['role'] }}] {{ m['content'] }}{% endfor -%}
{% if add_generation_prompt %}{{ '\\n' }}[assistant] {% endif %}"""


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    corpus = ["def add(x, y):\n    return x + y\n", "stop here, stop there", "größer 漢字 🙂 naïve"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )
    model.train_from_iterator(corpus * 3, trainer)
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE, model_max_length=50
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path):
    from flexbatch.models.resolve import load_tokenizer

    return load_tokenizer(tokenizer_folder)
