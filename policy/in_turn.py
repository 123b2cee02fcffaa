"""What a micro-batch takes from one layer's CPU attention to the next one's, and how much of it others hide.

::

    host launches   | first half 1 | second half 0 | first half 0' | second half 1 | first half 1' | ...
    GPU             |       computes 1     |   computes 0, 0'      |   computes 1, 1'      |
    CPU             |  attends 0   |  (waits)  attends 1  | (waits)  attends 0'  |  attends 1'  | ...

A micro-batch goes from the host that launches to the GPU to the CPU and back to the host, one after another. The
second half of a tick waits while one more tick is begun, or two, and no longer: so a layer takes at least half of the
sum over its micro-batches, or a third, and with one micro-batch all of it. A simulation of the executor's order, with
random times, takes the longest of this and of what each is busy for, in the median to the digit; it takes up to a
fourth less where the GPU's part is long, because of the second half it computes a part while the next first half is
launched.
"""

from __future__ import annotations

import numpy as np

from flexbatch.policy.affine import affine
from flexbatch.policy.expansion import quantized_launch_seconds
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import Policy


def ticks_put_off(shape: ModelShape, policy: Policy, load: PassLoad) -> np.ndarray:
    """Whose second halves may wait while others are begun, in each pass: of a micro-batch that is alone none."""
    if policy.num_gpu_batches == 1:
        return np.zeros(np.shape(load.prompt_tokens))
    several = policy.num_gpu_batches > 2 and not policy.cpu_experts and shape.stages == 1
    return np.where(several & (np.asarray(load.prompt_tokens) == 0), 2.0, 1.0)


def in_turn_seconds(
    shape: ModelShape,
    hardware: Hardware,
    policy: Policy,
    load: PassLoad,
    on_cores: np.ndarray,
    gpu_seconds: np.ndarray,
    calls: np.ndarray,
) -> np.ndarray:
    """Of a layer, affine in the placement. on_cores, gpu_seconds: what the CPU and the GPU are busy for, likewise.
    calls: of CPU attention, in each pass. Of Llama-3-8B with 8 bits and one micro-batch 53 ms of the CPU's, 35 of
    launching and 12 of the GPU's were passes of 101 to 107 ms."""
    fetch = calls * hardware.launched_seconds("fetch")
    alone = policy.num_gpu_batches == 1
    exchange = hardware.exchange_seconds if alone else hardware.launched_seconds("attended")
    codes = np.where(calls > 0, quantized_launch_seconds(hardware, policy, load.tokens), 0.0)
    launching = affine(calls * (exchange + hardware.launch_seconds) + codes, weights_cpu=fetch, weights_disk=fetch)
    beside = 1.0 + ticks_put_off(shape, policy, load)
    return (on_cores + gpu_seconds + launching) / beside[..., None]
