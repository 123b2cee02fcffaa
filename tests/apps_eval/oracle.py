"""A tiny model on disk, and an engine with the interface of `LLM` that runs it through transformers: the oracle of
these tests."""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from flexbatch.request import Completion, SamplingParams, TokenLogprob
from tests.tiny_models import train_tokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog. Question: which letter? Answer: A B C D. Even Odd. Yes No.\n"
    "Product A is name: red ale. Product B is name: dark ale. Are Product A and Product B the same? Yes\n"
    "Please complete the rest of the following Dyck sequences ( ( ) ) [ ] { }.\n0 1 2 3 4 5 6 7 8 9"
)
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt "
    "%}<|assistant|>{% endif %}"
)


def make_tokenizer(bos: bool = False, chat: bool = False):
    """A byte-level BPE tokenizer with about 330 tokens; ``bos`` prepends <s> as Llama does."""
    special = ["<s>", "</s>", "<|im_end|>"]
    tokenizer = train_tokenizer([TEXT], 330, special, bos, model_max_length=512)
    tokenizer.clean_up_tokenization_spaces = False
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def make_pieces():
    """A Unigram tokenizer as SentencePiece makes them: a space belongs to the word after it, and every text begins
    with one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", "<|im_end|>"]
    alphabet = sorted({*TEXT, *"zxyj"} - {" ", "\n"})
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT], trainer)
    # The trainer numbers equal pieces by the order of a hash table: another model in every process, of which one in
    # sixty says a stop string in its thoughts, where the harness ends and FlexBatch goes on.
    learned = sorted(set(inner.get_vocab()) - set(special))
    inner.model = models.Unigram([(piece, -1.0 - len(piece) / 100) for piece in [*special, *learned]], unk_id=0)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_model(
    folder: Path, *, seed: int = 0, bos: bool = False, chat: bool = False, positions: int = 512, tokenizer: Any = None
) -> Path:
    """A random Llama (2 layers, width 64) in fp32 with its tokenizer; weights are scaled up so that the logits
    differ clearly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = tokenizer or make_tokenizer(bos, chat)
    tokenizer.model_max_length = positions
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).float()
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class OracleLLM:
    """`LLM.generate` and `LLM.stream`, one sequence at a time, on transformers in fp32."""

    def __init__(self, model: str | Path, **engine: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.engine = engine
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.positions = self.model.config.max_position_embeddings
        self.arch = SimpleNamespace(context=self.positions)
        self.batches: list[int] = []
        self.closed = False

    def generate(
        self, prompts, sampling_params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Completion]:
        single = sampling_params is None or isinstance(sampling_params, SamplingParams)
        each = [sampling_params or SamplingParams()] * len(prompts) if single else sampling_params
        done = dict(self.stream((i, p, s) for i, (p, s) in enumerate(zip(prompts, each, strict=True))))
        return [done[i] for i in range(len(prompts))]

    def stream(
        self, items: Iterable[tuple[Any, Any, SamplingParams]], on_tokens=None
    ) -> Iterator[tuple[Any, Completion]]:
        self.batches.append(0)
        for key, prompt, params in items:
            self.batches[-1] += 1
            ids = self._encode(prompt)
            if not ids or len(ids) + params.max_tokens > self.positions + (params.max_tokens == 0):
                problem = (
                    f"the prompt has {len(ids)} tokens and asks for {params.max_tokens} more, the model has "
                    f"{self.positions} positions"
                )
                yield key, Completion(prompt_token_ids=list(ids), finish_reason="error", error=problem)
                continue
            samples = [self._complete(ids, params, sample) for sample in range(params.n)]
            if params.n > 1:
                samples[0].samples = samples
            if on_tokens is not None:
                on_tokens(key, samples[0].text)
            yield key, samples[0]

    def close(self) -> None:
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _encode(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if prompt and isinstance(prompt[0], dict):
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(prompt)

    @torch.no_grad()
    def _complete(self, ids: list[int], params: SamplingParams, sample: int) -> Completion:
        logits = self.model(torch.tensor([ids[: self.positions]])).logits[0].float()
        result = Completion(prompt_token_ids=list(ids), finish_reason="length")
        if params.prompt_logprobs is not None:
            table = torch.log_softmax(logits, -1)
            result.prompt_logprobs = [None] + [
                entry(table[i], ids[i + 1], params.prompt_logprobs) for i in range(len(ids) - 1)
            ]
        result.logprobs = [] if params.logprobs is not None else None
        random = torch.Generator().manual_seed((params.seed or 0) + 7919 * sample)
        for _ in range(params.max_tokens):
            row = logits[-1]
            probabilities = torch.softmax(row / max(params.temperature, 1e-6), -1)
            token = int(row.argmax() if params.greedy else torch.multinomial(probabilities, 1, generator=random))
            result.token_ids.append(token)
            if result.logprobs is not None:
                result.logprobs.append(entry(torch.log_softmax(row, -1), token, params.logprobs or 0))
            if token == self.tokenizer.eos_token_id and not params.ignore_eos:
                result.finish_reason = "stop"
                break
            before, whole = (
                self.tokenizer.decode(each, skip_special_tokens=True) for each in (ids, ids + result.token_ids)
            )
            result.text = whole[len(os.path.commonprefix([before, whole])) :]  # noqa: RUF071
            found = [(result.text.index(stop), stop) for stop in params.stop if stop in result.text]
            if found:
                at, result.stop_reason = min(found)
                result.text, result.finish_reason = result.text[:at], "stop"
                break
            logits = self.model(torch.tensor([ids + result.token_ids])).logits[0].float()
        return result


def entry(row: torch.Tensor, token: int, count: int) -> dict[int, TokenLogprob]:
    """The chosen token and the ``count`` most likely ones of one row of log-probabilities."""
    wanted = [token, *row.topk(count).indices.tolist()] if count else [token]
    return {t: TokenLogprob(t, float(row[t]), int((row > row[t]).sum()) + 1) for t in wanted}
