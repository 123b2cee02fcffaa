"""The batch command as a process of its own: ``python -m tests.apps_batch.driver '{"block": 8}' INPUT OUTPUT ...`` with the fake engine.

With ``{"real": true, "count_file": ...}`` it runs the real one, and counts every token that is generated there, those of killed processes included.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from flexbatch.apps.batch import main
from tests.apps_batch.fake import FakeLLM


def count_real_tokens(count_file: str) -> None:
    from flexbatch.execution.batcher import Batcher

    descriptor, extend = os.open(count_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), Batcher.extend

    def counted(self: Batcher, sequence: Any, result: Any) -> int:
        os.write(descriptor, b"." * len(result.token_ids))
        return extend(self, sequence, result)

    Batcher.extend = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    settings, words = json.loads(sys.argv[1]), sys.argv[2:]
    if settings.pop("real", False):
        count_real_tokens(**settings)
        sys.exit(main(words))
    sys.exit(main(words, open_engine=lambda config, seen: FakeLLM(**settings), identity=lambda config: {"weights": f"fake {config.model}"}))
