"""HELM's view of the engine: a client that answers one request, or all the requests of a scenario, with one block of
sequences.

Behavior follows crfm-helm 0.5.16: ``helm.clients.huggingface_client`` (what a completion holds),
``helm.benchmark.executor`` (what becomes of an error), ``helm.proxy.retry`` (when a request is sent again) and
``helm.common.cache`` (keys and stores).
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import weakref
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helm.clients.client import CachingClient
from helm.common.cache import cache_stats, create_key_value_store, write_to_key_value_store
from helm.common.request import Request, RequestResult
from tqdm import tqdm

from flexbatch.apps.helm_models import model_folder
from flexbatch.apps.helm_responses import failure, result_of, sample_of
from flexbatch.models.fingerprint import combined, model_files_digest
from flexbatch.request import Completion, SamplingParams

if TYPE_CHECKING:
    from flexbatch import LLM

LOGPROBS = ("model", "huggingface")
OUTPUT_FIELDS = ("weight_bits", "cache_bits", "dtype", "device", "dummy_weights", "seed", "lora", "lora_default")
"""Engine settings that can change a token, and so belong to the cache key; placement and batching cannot."""


@dataclass(frozen=True)
class PendingRequest:
    """One request to compute: its cache key, prompt and parameters, and the indices of the requests that wait for its
    result."""

    key: dict[str, Any]
    prompt_token_ids: list[int]
    params: SamplingParams
    request: Request
    indices: list[int]


class FlexBatchClient(CachingClient):
    """Answers HELM's requests with FlexBatch.

    HELM injects ``cache_config``, ``tokenizer`` and ``end_of_text_token``; the other arguments come from the deployment
    (``client_spec.args`` in ``model_deployments.yaml``, or `flexbatch.apps.helm`):

    - ``pretrained``: what `LLM` loads; ``**engine``: keywords of `LLM` (``percent``, ``gpu_batch_size``, ...);
    - ``apply_chat_template``: None decides as HELM's own client does, by whether the tokenizer has a template;
    - ``logprobs``: ``model`` gives the model's log-probabilities of generated tokens. ``huggingface`` gives what HELM's
      Hugging Face client
      gives at temperature 0, the log-probability after division by the temperature, which is 0.0 for every token;
    - ``queue_seconds``: how long `make_request` waits for requests of other threads to share its block.
    """

    def __init__(
        self,
        cache_config: Any,
        tokenizer: Any,
        pretrained: str,
        end_of_text_token: str | None = None,
        apply_chat_template: bool | None = None,
        logprobs: str = "model",
        queue_seconds: float = 0.05,
        **engine: Any,
    ) -> None:
        super().__init__(cache_config=cache_config)
        if logprobs not in LOGPROBS:
            raise ValueError(f"logprobs={logprobs!r} must be one of {', '.join(LOGPROBS)}")
        self.pretrained = pretrained
        self.engine = engine
        self.logprobs = logprobs
        self.queue_seconds = queue_seconds
        self._tokenizer = tokenizer.get_wrapped_tokenizer()
        with self._tokenizer as inner:
            self._chat = bool(inner.chat_template) if apply_chat_template is None else apply_chat_template
            ends = {inner.eos_token_id} | (
                {inner.convert_tokens_to_ids(end_of_text_token)} if end_of_text_token else set()
            )
            self._end_ids = ends - {None, inner.unk_token_id}
        self._llm: LLM | None = None
        self._engine_lock = threading.Lock()
        self._queue: list[tuple[Request, Future[RequestResult]]] = []
        self._queue_lock = threading.Lock()

    @property
    def llm(self) -> LLM:
        """The engine, loaded when the first request needs it: a dry run or a full cache loads nothing. Call with the
        engine lock held."""
        if self._llm is None:
            self._llm = self.load()
            weakref.finalize(self, self._llm.close)
        return self._llm

    def load(self) -> LLM:
        from flexbatch import LLM

        return LLM(self.pretrained, **self.engine)

    @cached_property
    def _weights(self) -> str:
        """A digest of the model's folder for the cache key: a folder may be trained further under the same name.
        Empty for a Hub id."""
        folder = Path(model_folder(self.pretrained))
        if not folder.exists() or self.engine.get("dummy_weights"):
            return ""
        return combined("model", (f"{name} {digest}\n".encode() for name, digest in model_files_digest(folder).items()))

    def close(self) -> None:
        with self._engine_lock:
            if self._llm is not None:
                self._llm.close()
                self._llm = None

    def make_request(self, request: Request) -> RequestResult:
        """Answers one request of HELM's ordinary runner: requests that other threads make within ``queue_seconds``,
        or while a block runs, join the next block."""
        answer: Future[RequestResult] = Future()
        with self._queue_lock:
            self._queue.append((request, answer))
            leads = len(self._queue) == 1
        if leads:
            time.sleep(self.queue_seconds)
            with self._engine_lock:
                with self._queue_lock:
                    queue, self._queue = self._queue, []
                try:
                    results = self._answer([item for item, _ in queue])
                except BaseException as problem:
                    results = [failure(f"{type(problem).__name__}: {problem}", fatal=True)] * len(queue)
                    if not isinstance(problem, Exception):
                        raise
                finally:
                    for (_, waiting), result in zip(queue, results, strict=True):
                        waiting.set_result(result)
        return answer.result()

    def make_requests(self, requests: list[Request]) -> list[RequestResult]:
        """Returns results in the order of the requests, all of them computed in one block. Answers from the cache
        first, and stores each new answer when it is there."""
        with self._engine_lock:
            return self._answer(requests)

    def _answer(self, requests: list[Request]) -> list[RequestResult]:
        results: list[RequestResult | None] = [None] * len(requests)
        to_compute: dict[str, PendingRequest] = {}
        _ = self._weights  # a folder without weights is an error of the run, not of its requests
        with create_key_value_store(self.cache.config) as store:
            for index, request in enumerate(requests):
                try:
                    pending = self._pending(request, index)
                except (ValueError, TypeError) as problem:
                    results[index] = failure(str(problem))
                    continue
                cache_stats.increment_query(self.cache.config.cache_stats_key)
                name = json.dumps(pending.key, sort_keys=True)
                if name in to_compute:
                    to_compute[name].indices.append(index)
                elif response := store.get(pending.key):
                    results[index] = result_of(response, cached=True)
                else:
                    to_compute[name] = pending
            if to_compute:
                for pending, response in self._compute(list(to_compute.values()), store):
                    for index in pending.indices:
                        results[index] = (
                            failure(response) if isinstance(response, str) else result_of(response, cached=False)
                        )
        missing = [index for index, result in enumerate(results) if result is None]
        if missing:
            raise RuntimeError(f"the engine returned no completion for requests {missing[:10]} of {len(requests)}")
        return [result for result in results if result is not None]

    def _compute(
        self, pending_requests: list[PendingRequest], store: Any
    ) -> Iterator[tuple[PendingRequest, dict[str, Any] | str]]:
        """Runs all requests in one `LLM.stream`; yields each with its response, or with the message of its error."""
        began = time.time()
        responses: list[tuple[PendingRequest, dict[str, Any]]] = []
        running: dict[Hashable, PendingRequest] = dict(enumerate(pending_requests))
        items = ((number, pending.prompt_token_ids, pending.params) for number, pending in running.items())
        batch_size = sum(len(pending.indices) for pending in pending_requests)  # of equal requests all count
        with tqdm(total=len(pending_requests), desc="FlexBatch", unit="request", disable=None) as progress:
            for number, completion in self.llm.stream(items):
                pending = running[number]
                progress.update()
                cache_stats.increment_compute(self.cache.config.cache_stats_key)
                if completion.finish_reason == "error":
                    yield pending, completion.error or "the engine gave no reason"
                    continue
                response = self._response(pending, completion)
                response |= {
                    "request_time": time.time() - began,
                    "request_datetime": int(began),
                    "batch_size": batch_size,
                }
                response["batch_request_time"] = response["request_time"]
                write_to_key_value_store(store, pending.key, response)
                responses.append((pending, response))
        seconds = time.time() - began
        for pending, response in responses:
            response["batch_request_time"] = seconds
            write_to_key_value_store(store, pending.key, response)
            yield pending, response

    def _pending(self, request: Request, index: int) -> PendingRequest:
        """Makes the prompt, parameters and cache key of a request. Raises ValueError for what the engine does not
        do: embeddings, images, JSON schemas, out-of-range parameters."""
        for field in ("embedding", "multimodal_prompt", "image_generation_parameters", "response_format"):
            if getattr(request, field):
                raise ValueError(f"{field} is not available: FlexBatch runs text decoders")
        prompt, templated = self._prompt(request)
        raw = {
            "engine": f"flexbatch:{self.pretrained}",
            "weights": self._weights,
            "settings": {name: self.engine[name] for name in OUTPUT_FIELDS if name in self.engine},
            "prompt": prompt,
            "temperature": request.temperature,
            "num_completions": request.num_completions,
            "max_tokens": request.max_tokens,
            "top_p": request.top_p,
            "top_k_per_token": request.top_k_per_token,
            "echo_prompt": request.echo_prompt,
            "stop_sequences": request.stop_sequences,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
        }
        key = dict(CachingClient.make_cache_key(raw, request))
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).digest()
        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            # 1 is HELM's default and dates from counting alternatives: as a filter it would make every sample greedy
            top_k=request.top_k_per_token if request.top_k_per_token > 1 else 0,
            stop=[stop for stop in request.stop_sequences if stop],
            n=request.num_completions,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            # the key holds `random`, so that the draw depends on the request alone and never on its block
            seed=int.from_bytes(digest[:4], "little"),
            logprobs=0,
            prompt_logprobs=0 if request.echo_prompt else None,
        )
        with self._tokenizer as tokenizer:
            ids = tokenizer(prompt, add_special_tokens=not templated)["input_ids"]
        return PendingRequest(key, ids, params, request, [index])

    def _prompt(self, request: Request) -> tuple[str, bool]:
        """Returns the prompt's text and whether it went through the chat template (which writes its own special
        tokens)."""
        if request.prompt and request.messages:
            raise ValueError("set either prompt or messages, not both")
        if not self._chat:
            if request.messages:
                raise ValueError("messages need a chat template, and the tokenizer has none")
            return request.prompt, False
        messages = request.messages or [{"role": "user", "content": request.prompt}]
        with self._tokenizer as tokenizer:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), True

    def _response(self, pending: PendingRequest, completion: Completion) -> dict[str, Any]:
        """Returns what the cache keeps: text, token texts, log-probabilities and the finish reason of every sample."""
        request, samples = pending.request, completion.samples or [completion]
        zeros = self.logprobs == "huggingface" and request.temperature == 0
        ids = list(completion.prompt_token_ids)
        with self._tokenizer as tokenizer:
            prompt_tokens = [tokenizer.decode([i]) for i in ids] if request.echo_prompt else []
            prompt_text = tokenizer.decode(ids) if request.echo_prompt else ""
            answers = [sample_of(tokenizer, sample, request, self._end_ids, zeros) for sample in samples]
        # as HELM wants it, the first token has no context and log-probability 0
        rows = zip(ids[1:], (completion.prompt_logprobs or [])[1:], strict=True) if prompt_tokens else ()
        prompt_logprobs = [0.0][: len(prompt_tokens)] + [row[i].logprob for i, row in rows if row is not None]
        for answer in answers:
            answer["text"] = prompt_text + answer["text"]
            answer["tokens"] = prompt_tokens + answer["tokens"]
            answer["logprobs"] = prompt_logprobs + answer["logprobs"]
        return {"completions": answers}
