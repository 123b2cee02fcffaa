"""The batch command with the fake engine, as a process of its own: ``python -m tests.apps_batch.driver '{"block": 8}' INPUT OUTPUT ...``."""

from __future__ import annotations

import json
import sys

from flexbatch.apps.batch import main
from tests.apps_batch.fake import FakeLLM

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    sys.exit(main(sys.argv[2:], open_engine=lambda config, seen: FakeLLM(**settings), identity=lambda config: {"weights": f"fake {config.model}"}))
