"""``python -m flexbatch.apps.serve``."""

import sys

from flexbatch.apps.serve.command import main
from flexbatch.policy.stdout import run_process

if __name__ == "__main__":
    sys.exit(run_process(main))
