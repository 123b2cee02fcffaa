"""The engine: load a model over the tiers, run requests through it, give results.

`generate`, `stream` and `step` turn `loop.EngineLoop`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexbatch import jobs
from flexbatch.config import EngineConfig
from flexbatch.execution.bar import finished_bar
from flexbatch.execution.job import Job
from flexbatch.execution.observer import RunObserver
from flexbatch.execution.requests import Params, requests_of
from flexbatch.execution.runner import Runner
from flexbatch.execution.turns import Turns
from flexbatch.execution.waiting import WaitingLine
from flexbatch.execution.watch import OnPass, OnText, first_text
from flexbatch.intake import Intake, Item
from flexbatch.loop import EngineLoop
from flexbatch.memory.weights import WeightStore
from flexbatch.models.lora.request import LoRA
from flexbatch.planner import usage
from flexbatch.planner.adapter_choice import AdapterChoice
from flexbatch.planner.capacity import Capacity
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.loader import PlacedModel
from flexbatch.planner.meshes import with_chosen_mesh
from flexbatch.planner.other_engines import line_of, prepare_everywhere, refuse_listeners
from flexbatch.planner.planner import Planner
from flexbatch.planner.report import Report, Statistics
from flexbatch.planner.vllm_keywords import NamesOfVllm, check_call, engine_settings
from flexbatch.policy.policy import Policy
from flexbatch.request import Completion, SamplingParams
from flexbatch.speculative.speculator import Speculator
from flexbatch.text.chat import ChatOptions
from flexbatch.text.prompts import Prompt
from flexbatch.trace import RecordingTracer, Tracer


class LLM(NamesOfVllm):
    """A model whose weights, KV cache and activations are spread over GPU, CPU and disk.

    Keywords are the fields of `EngineConfig`; what is None is chosen. Those of vLLM's `LLM` are taken as what they mean
    here, or refused with the setting to use (`planner.vllm_keywords`). Use as a context manager, or call `close`: it
    frees pinned memory, threads, files. Raises ConfigurationError for wrong settings, DoesNotFitError when the
    budgets do not hold one sequence, CheckpointError for a bad model. Weights are placed for the first job, once it is
    known (`prepare`, `generate`, or `stream` when it has looked ahead); a later one that would run faster by more than
    10 % with weights on other tiers has them moved.
    """

    loop_class = EngineLoop

    def __init__(self, model: str = "demo", *, trace: bool = False, **settings: Any) -> None:
        self._start(Planner(with_chosen_mesh(EngineConfig(model=model, **engine_settings(settings)))), trace)

    @classmethod
    def from_config(cls, config: EngineConfig, trace: bool = False, job: Job | None = None) -> LLM:
        """An engine from a ready configuration; ``job`` tells the planner what will be run."""
        return cls.from_planner(Planner(with_chosen_mesh(config, job), job), trace)

    @classmethod
    def from_planner(cls, planner: Planner, trace: bool = False) -> LLM:
        """An engine as planned."""
        engine = cls.__new__(cls)
        engine._start(planner, trace)
        return engine

    @classmethod
    def plan(cls, config: EngineConfig, job: Job) -> dict[str, Any]:
        """What `from_config` and running the job would put where, without loading anything: the first part of `report`,
        and the `Plan` as "plan". With a named machine (--hardware) and the default device, it is planned for that
        machine and its memory; nothing is measured. Raises DoesNotFitError when the job does not fit the budgets.
        """
        return Planner(config, job, dry=True).describe(job)

    def _start(self, planner: Planner, trace: bool, waiting: WaitingLine | None = None) -> None:
        self.planner, self.config, self.generation = planner, planner.config, planner.generation
        self._turns, deployment = Turns(), planner.deployment
        self.arch, self.tokenizer = deployment.model.arch, deployment.model.tokenizer
        self.tracer: Tracer = RecordingTracer(deployment.device) if trace else usage.UsageTracer(deployment.device)
        choice = AdapterChoice(planner, lambda: self._loop.scheduler is None)
        self._model = PlacedModel(deployment, self.tracer)
        others = self._model.others
        line = line_of(others, waiting)
        self._intake = Intake(planner.encoder, planner.generation, self.arch, self.config.seed, choice, line)
        self.tiers, self.queues = self._model.tiers, self._model.queues
        self._capacity = Capacity(planner, self.tiers, self.queues, self._model.place, self._model.leader)
        self._loop = self.loop_class(planner, self._capacity, self._intake, self.tracer, others)
        if planner.job_is_known:
            with self._model.closed_on_error():
                if others is not None:
                    others.place(self._capacity)
                self._capacity.place(planner.engine_plan)

    @property
    def engine_plan(self) -> EnginePlan:
        """That of the latest job; before the first, the one for a typical job."""
        return self.planner.engine_plan

    @property
    def weights(self) -> WeightStore:
        """Where they lie for the latest job. Before the first, they are placed for a typical one."""
        self._turns.check_open("weights")
        return self._capacity.weights or self._capacity.place(self.engine_plan)

    @property
    def speculator(self) -> Speculator | None:
        """The drafts, loaded with the weights."""
        return self._capacity.speculator if self.weights is not None else None

    @property
    def policy(self) -> Policy:
        """The policy that was chosen for the latest job."""
        return self.engine_plan.policy

    @property
    def statistics(self) -> Statistics:
        """The statistics of all runs so far."""
        return self._loop.statistics

    @property
    def prediction(self) -> dict[str, Any]:
        """Predicted against measured, of the last run that had a plan."""
        return self._loop.prediction

    @property
    def runner(self) -> Runner | None:
        """What runs passes; None before the first job, and after a failure."""
        return self._capacity.runner

    # Jobs

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool | Callable[..., Any] = False,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_finished: Callable[[Completion], None] | None = None,
        on_prompt: Callable[[int, Completion], None] | None = None,
        first_index: int | None = None,
        lora_request: LoRA | Sequence[LoRA] = None,
        **others: Any,
    ) -> list[Completion]:
        """Complete one prompt or several (text, token ids or chat messages); one SamplingParams for all or one each.
        Results in the order of the prompts.

        Without SamplingParams those of `get_default_sampling_params` hold; with them, nothing of the model's
        generation_config.json but its EOS tokens. ``use_tqdm`` shows a bar. ``chat_template`` and the four after it are
        for prompts of chat messages, see `ChatOptions`. ``on_finished`` is called with every completion as it ends, in
        any order; ``on_prompt`` with every prompt's index and its completion, all samples in it, when the last of them
        ends. ``first_index`` is the index of the first prompt in a larger job, whose rest then draws the tokens that it
        would have drawn. ``lora_request``: the adapter of all prompts, or one each. Raises PromptError for the first
        prompt that cannot be run, before anything is generated; EngineBusyError while a stream is open, or in a
        callback of this engine. A prompt that fails on the way has ``finish_reason`` "error" and the rest goes on.
        """
        if others:
            check_call("LLM.generate", others, LLM.generate)
        more = add_generation_prompt, continue_final_message, tools, chat_template_kwargs or {}
        options = ChatOptions(chat_template, *more)
        with self._turns.whole("generate"):
            self._intake.check_empty("generate")
            requests = self._intake.requests(prompts, sampling_params, first_index, options, lora_request)
            drafted = self.planner.deployment.speculation is not None
            run = jobs.compared if self.config.compare_plain and drafted else jobs.completions
            with finished_bar(use_tqdm, len(requests), on_finished) as told:
                return self._intake.gather(run(self._loop, requests), told, on_prompt)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Params = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Answer one conversation, a list of messages, or several. As `generate`, whose other keywords it takes, but
        where nothing else is said an answer begins after every last message, also one of the assistant, as in vLLM."""
        self._turns.check_open("chat")
        begun = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        options |= {"add_generation_prompt": begun, "continue_final_message": continue_final_message}
        return self.generate(messages, sampling_params, **options)

    def prepare(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> None:
        """Allocate what a job of these prompts needs, as `generate` would at its start: outside of a measurement."""
        with self._turns.whole("prepare"):
            self._intake.check_empty("prepare")
            requests = requests_of(prompts, sampling_params, self._intake.encoder, self._intake.defaults)
            prepare_everywhere(self._model.others, self._capacity, self._loop.job(requests))

    def stream(
        self, items: Iterable[Item], on_tokens: Callable[[Hashable, str], None] | None = None
    ) -> Iterator[tuple[Hashable, Completion]]:
        """Complete (key, prompt, params) items, or (key, prompt, params, source, lora_request), as they come; yields
        (key, completion) as sequences finish, in any order. Answers of one source are expected to be of like lengths.

        Items are drawn about a block ahead, in a thread of their own, so that one that is slow to come holds up no
        sequence in flight. An item that cannot be run yields a completion with ``finish_reason`` "error" and the rest
        goes on. ``on_tokens(key, new_text)`` is called after every pass with text of the item's first sample that
        will not change any more. The engine belongs to the stream from its first item until its end, or its close():
        other calls raise EngineBusyError. If the engine is closed before, the stream raises EngineClosedError.
        """
        self._turns.check_open("stream")
        refuse_listeners(self._model.others, on_tokens=on_tokens)
        return self._turns.stream(jobs.stream(self._loop, items, on_tokens, self._turns.helper))

    # One request, one pass at a time

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: Hashable = None,
        on_text: OnText | None = None,
        lora_request: LoRA = None,
        priority: int = 0,
        source: Hashable = None,
        on_pass: OnPass | None = None,
    ) -> Hashable:
        """Let a prompt wait for `step`; returns its id, a number where None is given. May be called at any time, also
        while another thread runs a pass, whose end it does not wait for, and by ``on_text``, which is told of the new
        text of its first sample after every pass. ``on_pass``, in its place, is shown the sequence of every sample.
        Smaller ``priority`` goes first, and others step aside for it. Answers of one ``source`` are expected to be of
        like lengths. Raises PromptError for a prompt that cannot be run, ConfigurationError for an id that is still in
        use, EngineBusyError while a stream is open."""
        refuse_listeners(self._model.others, on_text=on_text, on_pass=on_pass)
        told = on_pass if on_text is None else first_text(on_text)
        more = {"lora": lora_request, "priority": priority, "source": source}
        with self._turns.addition("add_request"):
            return self._intake.add_named(request_id, prompt, sampling_params, told, **more)

    def step(self) -> list[tuple[Hashable, Completion]]:
        """Run one pass over the requests that were added; returns (id, completion) of those that finished. A request
        that cannot go on has ``finish_reason`` "error". An error of the pass itself ends all of them."""
        with self._turns.step(), jobs.ended_when_empty(self._loop):
            return jobs.step(self._loop, complete=False) if self._intake else []

    def abort(self, request_id: Hashable) -> bool:
        """Give up a request that waits or runs: its pages are free, and nothing comes of it. Others go on. Returns
        whether there was one. Waits for a pass in another thread."""
        with self._turns.change("abort"):
            dropped = self._intake.drop(request_id)
            self._loop.abort(dropped)
            return bool(dropped)

    def has_unfinished(self) -> bool:
        """Whether requests that were added wait or run."""
        self._turns.check_open("has_unfinished")
        return len(self._intake) > 0

    def drain(self) -> int:
        """Finish what is in flight and begin nothing else, as `EngineLoop.drain` says."""
        return self._loop.drain()

    # Report and end

    def watch(self, observer: RunObserver) -> None:
        """Let an observer see the runs that begin from now on: progress, say. It must not call the engine."""
        self._turns.check_open("watch")
        self._loop.watchers.append(observer)

    def report(self) -> Report:
        """Plan, realized placement, throughput and bytes per resource of what was run so far: a dict that prints as
        tables."""
        self._turns.check_open("report")
        return jobs.report(self._loop, self._model.describe())

    def close(self) -> None:
        """Free pinned memory, threads and files; a stream that is open ends. Closing again does nothing.

        Waits for a call in another thread. Raises EngineBusyError in a callback of this engine."""
        if self._turns.closed:
            return
        with self._turns.closing() as stream, contextlib.ExitStack() as stack:
            # Whatever of it fails, the rest is closed all the same.
            stack.callback(self._model.close)
            stack.callback(self._capacity.close)
            stack.callback(self._loop.drop_all)
            if stream is not None:
                stack.callback(stream.close)

    def __enter__(self) -> LLM:
        self._turns.check_open("with")
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
