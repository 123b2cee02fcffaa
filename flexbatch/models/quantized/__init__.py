"""Checkpoints whose matrices are stored in codes: how their config.json says so, and what the codes mean."""
