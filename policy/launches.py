"""What ticks have the host launch, in the measure of torch's own kernels: a kernel of Triton counts as two, for its
launcher takes twice as long; events, waits and copies as one each, and two allocations as one. A test counts the
kernels of ticks, over tensors of a GPU that is imagined."""

from __future__ import annotations

TRITON_KERNEL, ALLOCATION = 2.0, 0.5
"""In that measure."""
KERNELS_OF_TICK = 24
"""Two norms, four products, rotary, append, attention, activation, residuals, copies and their events: what a profile
times as ``launch_seconds``."""
COUNTED = {
    "staging": 13,
    "fetch": 7,
    "activations": 13,
    "coded": 23,
    "expand": 9,
    "sum": 6,
}
"""What may come to that.

- staging: cache that is attended from another tier is gathered, appended to and drained, with the events of that: by
  the parts of passes of Falcon-7B on an H100's host, where a tick took 1.1 ms besides and this 0.6.
- fetch: a slice of the next layer is put on the link: two waits, two changes of the stream, a copy, and two events.
- activations: hidden states go down and come up again, two queues each with its events.
- coded: each of four products arranges what it is given, multiplies and mostly adds up, three kernels of Triton and
  three allocations more in the place of one of torch.
- expand: of a layer, one for each quantized matrix.
- sum: what a sum of several ranks takes in a pass beside what it takes in a row of others: passes of Llama-3-8B,
  launched kernel by kernel, took two H100's hosts 0.15 ms longer for each than one's, where in a row each took 0.04.

By these, ticks of Llama-3-70B with 4 bits that two ranks share take 1.3 and 1.9 ms on two hosts where jobs took 1.5 and
2.1; counted as no more than products in codes they were 0.8 and 1.1."""
CPU_COUNTED = {**COUNTED, "coded": 12, "sum": 0}
"""On a processor a product in codes is one call, which unpacks them; the sum itself is what the host does."""
