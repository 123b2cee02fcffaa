"""Measures a machine: links, kernels, host, disk; the result is a `policy.hardware.Hardware`."""
