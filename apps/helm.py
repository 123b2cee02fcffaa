"""HELM plug-in: ``model=flexbatch/<org>/<name>`` without YAML, and a runner that gives a whole scenario to one block.

``helm-run`` imports this module through the entry-point group ``helm`` (or ``--plugins flexbatch.apps.helm``); the
import registers the names. Run it as

    helm-run -r mmlu:subject=anatomy,model=flexbatch/facebook/opt-30b -m 1000 --runner-class-name
    flexbatch.apps.helm.FlexBatchRunner

Engine settings come from ``FLEXBATCH_*`` here, from flags in `flexbatch.apps.helm_run`, or from ``client_spec.args``
of a ``model_deployments.yaml``. Written against crfm-helm 0.5.16.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import Executor, ExecutorError
from helm.benchmark.model_deployment_registry import (
    ClientSpec,
    ModelDeployment,
    model_deployment_generator,
    register_model_deployment,
)
from helm.benchmark.model_metadata_registry import (
    FULL_FUNCTIONALITY_TEXT_MODEL_TAG,
    TEXT_MODEL_TAG,
    ModelMetadata,
    get_model_metadata,
    register_model_metadata,
)
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner
from helm.benchmark.tokenizer_config_registry import (
    TokenizerConfig,
    TokenizerSpec,
    register_tokenizer_config,
    tokenizer_config_generator,
)
from helm.common.general import asdict_without_nones, parallel_map
from helm.common.hierarchical_logger import hlog, hwarn
from helm.common.local_context import LocalContext
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

from flexbatch.apps.helm_client import FlexBatchClient
from flexbatch.apps.helm_models import engine_settings, model_folder, positions

__all__ = ["ERRORS_FILE", "PREFIX", "FlexBatchClient", "FlexBatchExecutor", "FlexBatchRunner", "register"]

PREFIX = "flexbatch"
ERRORS_FILE = "flexbatch_errors.json"
"""Lists the requests of a run that failed, and why; it lies in the run's folder only if there are any."""


def register(name: str, **client_args: Any) -> ModelDeployment:
    """Registers deployment, metadata and tokenizer for ``flexbatch/<model>``; ``client_args`` go to `FlexBatchClient`.

    The model's configuration and tokenizer are read (not its weights). Raises OSError when the model is not there.
    """
    pretrained = name.removeprefix(f"{PREFIX}/")
    folder = model_folder(pretrained)
    model_name = "/".join(name.split("/")[-2:])
    try:
        get_model_metadata(model_name)
    except ValueError:
        register_model_metadata(
            ModelMetadata(
                name=model_name,
                creator_organization_name="Unknown",
                display_name=model_name,
                description=f"{pretrained}, run by FlexBatch",
                access="open",
                release_date=date.today(),
                tags=[TEXT_MODEL_TAG, FULL_FUNCTIONALITY_TEXT_MODEL_TAG],
            )
        )
    tokenizer = _register_tokenizer(name, folder)
    limits = [limit for limit in (tokenizer.model_max_length, positions(folder)) if limit and limit < 1_000_000]
    deployment = ModelDeployment(
        name=name,
        model_name=model_name,
        tokenizer_name=name,
        max_sequence_length=min(limits) if limits else None,
        client_spec=ClientSpec("flexbatch.apps.helm_client.FlexBatchClient", {"pretrained": pretrained, **client_args}),
    )
    register_model_deployment(deployment)
    return deployment


def _register_tokenizer(name: str, folder: str) -> Any:
    with HuggingFaceTokenizer.get_tokenizer(name, folder) as tokenizer:
        config = TokenizerConfig(
            name=name,
            tokenizer_spec=TokenizerSpec(
                "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer", {"pretrained_model_name_or_path": folder}
            ),
            end_of_text_token=tokenizer.eos_token or "",
            prefix_token=tokenizer.bos_token or "",
        )
    register_tokenizer_config(config)
    return tokenizer


@model_deployment_generator(PREFIX)
def generate_deployment(name: str) -> ModelDeployment:
    """Called by HELM for a name that nobody registered; registering it makes the next look-up a dictionary access."""
    return register(name, **engine_settings())


@tokenizer_config_generator(PREFIX)
def generate_tokenizer_config(name: str) -> TokenizerConfig | None:
    """Called by HELM for a YAML deployment that names ``tokenizer_name: flexbatch/<model>``."""
    from helm.benchmark.tokenizer_config_registry import TOKENIZER_NAME_TO_CONFIG

    _register_tokenizer(name, model_folder(name.removeprefix(f"{PREFIX}/")))
    return TOKENIZER_NAME_TO_CONFIG[name]


class FlexBatchExecutor(Executor):
    """Gives all requests of a scenario to one call of `FlexBatchClient.make_requests`; requests for other clients go
    the ordinary way."""

    def __init__(self, executor: Executor) -> None:
        self.execution_spec = executor.execution_spec
        self.context = executor.context
        self.failed: list[tuple[int, RequestState]] = []
        """Index and state of the requests of the last scenario that failed without being fatal."""
        self.clients: list[FlexBatchClient] = []

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Returns the scenario state with its results; failed requests are in `failed` instead, with the others of the
        same instance and trial left out.

        HELM's executor turns a failed request into an empty completion, which scores as an answer: wrong in
        generation, and in ``multiple_choice_separate_*`` the most likely of all, with log-probability 0. Raises
        ExecutorError for a fatal error, or when nothing is left.
        """
        self.failed = []
        if self.execution_spec.dry_run or not isinstance(self.context, LocalContext):
            return super().execute(scenario_state)
        states = list(scenario_state.request_states)
        by_deployment: dict[str, list[int]] = defaultdict(list)
        for index, state in enumerate(states):
            by_deployment[state.request.model_deployment].append(index)
        for name, indices in by_deployment.items():
            client = self.context.client._get_client(name)
            if isinstance(client, FlexBatchClient):
                self.clients += [client] if client not in self.clients else []
                results = client.make_requests([states[index].request for index in indices])
                done = [
                    dataclasses.replace(states[index], result=result)
                    for index, result in zip(indices, results, strict=True)
                ]
            else:
                done = parallel_map(
                    self.process, [states[index] for index in indices], parallelism=self.execution_spec.parallelism
                )
            for index, state in zip(indices, done, strict=True):
                states[index] = state
        hlog(f"Processed {len(states)} requests")
        return dataclasses.replace(scenario_state, request_states=self._without_failures(states))

    def _without_failures(self, states: list[RequestState]) -> list[RequestState]:
        for index, state in enumerate(states):
            if state.result.success or state.result.completions:
                continue
            if state.result.error_flags is None or state.result.error_flags.is_fatal is not False:
                raise ExecutorError(f"{state.result.error} Request: {state.request}")
            hwarn(f"Request {index} of {len(states)} failed and is left out of the metrics: {state.result.error}")
            self.failed.append((index, state))
        if not self.failed:
            return states
        bad = {_group(state) for _, state in self.failed}
        kept = [state for state in states if _group(state) not in bad]
        if not kept:
            raise ExecutorError(
                f"all {len(states)} requests failed or belong to a failed instance; the first error: "
                f"{self.failed[0][1].result.error}"
            )
        self.failed = [(index, state) for index, state in enumerate(states) if _group(state) in bad]
        return kept


def _group(state: RequestState) -> tuple[Any, ...]:
    """Returns a key for what HELM scores together: the requests of one instance, perturbation and trial."""
    return state.instance.id, state.instance.split, state.instance.perturbation, state.train_trial_index


class FlexBatchRunner(Runner):
    """HELM's runner with `FlexBatchExecutor`. Failed requests keep their index and error in ``scenario_state.json``,
    and are listed in `ERRORS_FILE`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.executor: FlexBatchExecutor = FlexBatchExecutor(self.executor)

    def run_all(self, run_specs: list[RunSpec]) -> None:
        try:
            super().run_all(run_specs)
        finally:
            for client in self.executor.clients:
                client.close()

    def run_one(self, run_spec: RunSpec) -> None:
        folder = Path(self._get_run_path(run_spec))
        (folder / ERRORS_FILE).unlink(missing_ok=True)
        self.executor.failed = []
        super().run_one(run_spec)
        if self.executor.failed:
            self._record(folder, self.executor.failed)

    @staticmethod
    def _record(folder: Path, left_out: list[tuple[int, RequestState]]) -> None:
        path = folder / "scenario_state.json"
        content = json.loads(path.read_text())
        for index, state in left_out:  # ascending, so that every insertion lands at its index in the whole scenario
            content["request_states"].insert(index, asdict_without_nones(state))
        path.write_text(json.dumps(content, indent=2))
        errors = [
            {
                "index": index,
                "instance": state.instance.id,
                "reference": state.reference_index,
                "error": state.result.error,
            }
            for index, state in left_out
            if not state.result.success
        ]
        (folder / ERRORS_FILE).write_text(json.dumps(errors, indent=2))
        hwarn(f"{len(errors)} requests failed; {len(left_out)} are left out of the metrics; see {folder / ERRORS_FILE}")
