"""HELM's client on the oracle instead of the engine: named in a model_deployments.yaml, it separates the adapter's faults from the engine's."""

from __future__ import annotations

from oracle import OracleLLM

from flexbatch.apps.helm_client import FlexBatchClient


class OracleClient(FlexBatchClient):
    def load(self):
        return OracleLLM(self.pretrained, **self.engine)
