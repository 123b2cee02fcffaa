"""What the host does for a pass by what it carries, where a profile has not measured it."""

from __future__ import annotations

from flexbatch.policy.hardware import Hardware

PROMPT_TOKEN_SHARE = 7e-4
"""Of ``pass_seconds``, a token of a prompt: 0.17 us of 0.21 ms by the profile of a processor with two cores, and 0.5 to
0.9 us of 1.0 ms by the passes of jobs on an H200. Both are the host's Python."""


def prompt_token_seconds(hardware: Hardware) -> float:
    """As measured, or by its share: profiles of before have none."""
    return hardware.prompt_token_seconds or PROMPT_TOKEN_SHARE * hardware.pass_seconds
