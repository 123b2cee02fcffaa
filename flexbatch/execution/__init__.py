"""How a pass runs: the schedule, the batcher, the executor and sampling."""
