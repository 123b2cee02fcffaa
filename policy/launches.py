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
    "staging": 9,
    "fetch": 7,
    "activations": 13,
    "coded": 23,
    "expand": 9,
    "sum": 6,
    "apart": 3,
    "attended": 16,
}
"""What may come to that. "coded" and "expand" are what a test counts over an imagined GPU. The others no kernel tells:
they are the events, waits and Python around copies and sums, and were chosen so that recorded passes come out.

- coded: each of four products arranges what it is given, multiplies and mostly adds up, three kernels of Triton and
  three allocations more in the place of one of torch.
- expand: of a layer, one for each quantized matrix.
- staging: cache that is attended from another tier is gathered, appended to and drained. It was 13, by the parts of
  passes of Falcon-7B on an H100's host, where a tick took 1.1 ms besides and this 0.6; since then rows of few tokens
  are drained by the stream that computes, by the code with 14 waits, events, changes of the stream and kernels and not
  20, so that it is 9.
- fetch: a slice of the next layer is put on the link: by the code two waits, two changes of the stream, a copy and two
  events.
- activations: hidden states go down and come up again; taken as dear as staging, after passes of Llama-3-70B with six
  micro-batches whose hidden states were in host memory.
- sum: what a sum of several ranks takes in a pass beside what it takes in a row of others. The mean pass of
  Llama-3-8B, prompts included, had two H100's hosts launch for 9.5 ms longer than one's, for 65 sums: 0.15 ms each,
  where in a row each took 0.04.
- apart: attention for prompts behind that for single tokens is a kernel of Triton more, and cuts what both are given.
  Pieces of OPT-1.3B with 60 sequences that decode took an H200's host 0.275 ms a layer, those of prompts alone 0.204.
- attended: queries, keys and values go down to the CPU, which is told of them, and a kernel brings results up: three
  copies of what is not dense (one, where they are few), events, a job for another thread and its wait, a kernel of
  Triton. By the code; it was not counted where another micro-batch hides the CPU's own work.

Without sum, activations or the five more of fetch the mean error of 14 recorded jobs on H200, of which some were looked
at for this, is 12.4 to 12.6 % and not 11.1, and of 8 on H100 12.3 to 13.3 and not 11.6."""
CPU_COUNTED = {**COUNTED, "coded": 12, "sum": 0, "apart": 0}
"""On a processor a product in codes is one call, which unpacks them; the sum itself is what the host does."""
