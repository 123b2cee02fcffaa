"""How a pass runs: the block, the scheduler, the executor and sampling."""
