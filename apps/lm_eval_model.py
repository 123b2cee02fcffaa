"""FlexBatch as a model of lm-evaluation-harness: all requests of a type in one block.

Numbers follow the harness's own ``hf`` model (lm_eval 0.4.13, ``lm_eval/models/huggingface.py``): how text becomes
tokens, what is cut when a request is longer than the context, and what a result holds.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from flexbatch.apps.lm_eval_settings import engine_arguments, sampling_params
from flexbatch.models.generation_config import GenerationDefaults
from flexbatch.models.resolve import load_tokenizer
from flexbatch.request import Completion, SamplingParams
from flexbatch.validation.errors import ConfigurationError

Scoring = tuple[tuple[str, str] | None, list[int], list[int]]
"""A continuation to score: cache key (None: not kept), context tokens, continuation tokens."""


class FlexBatchLM(TemplateLM):
    """``--model flexbatch --model_args pretrained=...,percent=...``

    ``pretrained`` is what `LLM` loads. ``max_length``, ``max_gen_toks``, ``add_bos_token``, ``prefix_token_id``,
    ``truncation``, ``chat_template_args``, ``enable_thinking`` and ``think_end_token`` (text or token id) mean what
    they mean for ``hf``. All other arguments are keywords of `LLM`; ``percent`` is six numbers between spaces. The
    harness's ``batch_size`` is without effect: the engine forms its own block.
    """

    def __init__(
        self,
        pretrained: str = "demo",
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        truncation: bool = False,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        llm: Any = None,
        **engine: Any,
    ) -> None:
        super().__init__()
        if enable_thinking and think_end_token is None:
            raise ConfigurationError(
                "--model_args: enable_thinking needs think_end_token, so that the thoughts can be told from the answer"
            )
        if llm is None:
            from flexbatch import LLM

            llm = LLM(pretrained, **engine_arguments(engine))
            weakref.finalize(self, llm.close)
        self.llm = llm
        # prompts reach the engine as token ids, so this is the tokenizer that makes them; the option changes what it
        # adds to a text
        self.tokenizer: Any = (
            llm.tokenizer
            if add_bos_token is None
            else load_tokenizer(llm.tokenizer.name_or_path, add_bos_token=add_bos_token)
        )
        self.pretrained = pretrained
        self.batch_size = batch_size
        self._max_length = max_length
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self.custom_prefix_token_id = prefix_token_id
        self.truncation = truncation
        self.enable_thinking = enable_thinking
        self.chat_template_args = (chat_template_args or {}) | (
            {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        )
        self.think_end_token = (
            int(think_end_token) if isinstance(think_end_token, str) and think_end_token.isdigit() else think_end_token
        )

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        choices = (self.custom_prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(token for token in choices if token is not None)

    @property
    def max_length(self) -> int:
        return self._max_length or self.llm.arch.context

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            special = False
        return self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))

    def _encode_context(self, string: str) -> list[int]:
        """Returns the tokens of a context to generate after; ``hf`` looks for a written BOS here, and for the prefix
        token when it scores."""
        special = False if has_bos_prefix(string, self.tokenizer.bos_token) else self.add_bos_token
        return self.tokenizer(
            string, truncation=self.truncation, **({} if special is None else {"add_special_tokens": special})
        )["input_ids"]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            names = ", ".join(sorted({request.task_name for request in requests if request.task_name}))
            raise ValueError(
                f"enable_thinking is for tasks that generate text; {names or 'these requests'} compare log-likelihoods"
            )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the history as text. A template that refuses system messages gets the history without them, as
        ``hf`` does."""
        from jinja2.exceptions import TemplateError

        options = dict(
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.chat_template_args,
        )
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError:
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, **options)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns log-likelihoods of whole texts: disjoint windows of the full context, every token scored once, all
        windows of all texts in one block."""
        windows: list[Scoring] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals: dict[int, float] = defaultdict(float)
        for index, (logprob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            totals[index] += logprob
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood_rolling", (request.args[0],), totals[index])
        return [totals[index] for index in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[Scoring], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """Returns (log-probability of the continuation, whether greedy decoding would give it) for each request.

        Too long requests lose tokens on the left, down to the context plus the last token, which is scored but never
        read. Raises ValueError for a continuation that is empty or longer than the context.
        """
        indices: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"request {index}: a context of {len(context)} and a continuation of {len(continuation)} tokens "
                    "cannot be scored; "
                    f"both need a token, and the continuation at most the model's {self.max_length}"
                )
            indices[tuple((context + continuation)[-(self.max_length + 1) :])].append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def finish(tokens: tuple[int, ...], completion: Completion) -> None:
            for index in indices[tokens]:
                key, _, continuation = requests[index]
                answers[index] = score(completion, tokens, len(continuation))
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[index])

        def params(tokens: tuple[int, ...]) -> SamplingParams:
            longest = max(len(requests[index][2]) for index in indices[tokens])
            return SamplingParams(
                max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_start=max(1, len(tokens) - longest)
            )

        # sorted, so that requests with the same few-shot prefix come to the engine one after the other and share its
        # pages
        self._run(
            ((tokens, list(tokens), params(tokens)) for tokens in sorted(indices)),
            finish,
            len(indices),
            "loglikelihood",
            disable_tqdm,
        )
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns generated texts, cut before the first stop sequence; too long contexts lose tokens on the left."""
        items = []
        for index, request in enumerate(requests):
            context, gen_kwargs = request.args
            params = self._sampling_params(index, gen_kwargs)
            prompt_limit = self.max_length - (params.max_tokens or 0)
            if prompt_limit <= 0:
                raise ValueError(
                    f"request {index}: max_gen_toks={params.max_tokens} leaves no room for a prompt in "
                    f"{self.max_length} positions; lower it"
                )
            items.append((index, self._encode_context(context)[-prompt_limit:], params))
        texts = [""] * len(requests)

        def finish(index: int, completion: Completion) -> None:
            context, gen_kwargs = requests[index].args
            until = gen_kwargs.get("until") or []
            texts[index] = self._answer(completion, [until] if isinstance(until, str) else until)
            self.cache_hook.add_partial("generate_until", (context, gen_kwargs), texts[index])

        self._run(sorted(items, key=lambda item: item[1]), finish, len(items), "generate_until", disable_tqdm)
        return texts

    def _answer(self, completion: Completion, until: Sequence[str]) -> str:
        """Returns the generated text as ``hf`` does: without thoughts, its tokens decoded by themselves, so that
        SentencePiece drops a first space, and cut at stop sequences."""
        token_ids, thought = list(completion.token_ids), self.think_end_token
        if isinstance(thought, int) and thought in token_ids:
            token_ids = token_ids[len(token_ids) - token_ids[::-1].index(thought) :]
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        ended = completion.stop_reason
        if isinstance(ended, str) and ended not in text and len(token_ids) == len(completion.token_ids):
            # the engine sees stop strings that ``hf`` does not: those that begin with that space, or reach over a
            # special token
            text = completion.text[completion.text.startswith(" ") and not text.startswith(" ") :]
        if isinstance(thought, int):
            text, thought = text.lstrip(), None
        return postprocess_generated_text(text, [*until, self.tokenizer.decode([self.eot_token_id])], thought)

    def _sampling_params(self, index: int, gen_kwargs: dict[str, Any]) -> SamplingParams:
        generation = getattr(self.llm, "generation", None) or GenerationDefaults()
        return sampling_params(
            index,
            gen_kwargs,
            generation,
            max_gen_toks=self.max_gen_toks,
            # A reasoning model's stop sequences are for its answer and may occur in its thoughts.
            stop_in_engine=self.think_end_token is None,
        )

    def _run(
        self,
        items: Iterable[tuple[Any, list[int], SamplingParams]],
        finish: Callable[[Any, Completion], None],
        total: int,
        name: str,
        quiet: bool,
    ) -> None:
        """Streams items through one block. Raises RuntimeError for requests that the engine refuses, after all
        others are done and cached."""
        refused = []
        with tqdm(total=total, desc=f"FlexBatch {name}", disable=quiet or None) as progress:
            for key, completion in self.llm.stream(items):
                progress.update()
                if completion.finish_reason == "error":
                    refused.append(completion.error)
                else:
                    finish(key, completion)
        if refused:
            raise RuntimeError(f"{len(refused)} of {total} {name} requests failed; the first: {refused[0]}")


def score(completion: Completion, tokens: Sequence[int], count: int) -> tuple[float, bool]:
    """Returns the sum of the log-probabilities of the last ``count`` prompt tokens, and whether each was the most
    likely one."""
    rows = [(completion.prompt_logprobs or [])[index] for index in range(len(tokens) - count, len(tokens))]
    entries = [row[token] for row, token in zip(rows, tokens[len(tokens) - count :], strict=True) if row is not None]
    return sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)
