"""A rank that ends with an error of its own."""

from __future__ import annotations

import sys
import time
import traceback


def main() -> int:
    if sys.argv[2] == "3":
        wait_for_nothing()
    try:
        return 1 // 0
    except ZeroDivisionError:
        traceback.print_exc()
        return 7


def wait_for_nothing() -> None:
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)
