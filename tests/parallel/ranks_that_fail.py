"""A rank that ends with an error of its own."""

from __future__ import annotations

import traceback


def main() -> int:
    try:
        return 1 // 0
    except ZeroDivisionError:
        traceback.print_exc()
        return 7
