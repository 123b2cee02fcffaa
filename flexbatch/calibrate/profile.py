"""``flexbatch profile -o hardware.json``: measures this machine for the policy optimizer.

Exit codes: 0 done, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from flexbatch.policy.command_line import Parser
from flexbatch.policy.stdout import data_apart, run_process
from flexbatch.validation.devices import check_device
from flexbatch.validation.errors import DONE, INTERRUPTED, USAGE, ConfigurationError


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "flexbatch profile",
        description="Measure this machine for the policy optimizer: links, kernels, host, disk, and what is between "
        "its GPUs. Takes about 20 s on an idle CPU machine, 40 s with a GPU, half a minute more with several. Every "
        "run measures by itself at first use; this is for other machines' plans.",
        first={
            "--output": "JSON file to write",
            "--device": "auto, cpu, cuda, cuda:N",
            "--offload-dir": "folder on the disk to measure (default: here)",
        },
        examples="""
            flexbatch profile -o hardware.json
            flexbatch run --hardware hardware.json
            """,
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument(
        "--offload-dir",
        type=Path,
        default=Path.cwd(),
        metavar="FOLDER",
        help="folder on the disk to measure (default: here)",
    )
    parser.add_argument(
        "--kernels",
        default="engine",
        choices=("engine", "none"),
        help="whose kernels are measured: the engine's, or torch's instead (default: %(default)s)",
    )
    return parser


def check(options: argparse.Namespace) -> None:
    """What needs no measurement. Raises ConfigurationError."""
    check_device(options.device)
    if options.output.is_dir() or not os.access(options.output.absolute().parent, os.W_OK):
        raise ConfigurationError(f"--output {options.output}: no file can be written there")
    if not options.offload_dir.is_dir():
        raise ConfigurationError(f"--offload-dir {options.offload_dir} is no folder")


def write_profile(options: argparse.Namespace) -> None:
    import torch

    from flexbatch.calibrate.interconnect import with_interconnect
    from flexbatch.calibrate.measure import begin_disk, measure
    from flexbatch.calibrate.phases import Phases
    from flexbatch.calibrate.profile_file import write_hardware

    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    kernels, disk = {}, begin_disk(device, options.offload_dir)
    phases = Phases(lambda line: print(line, file=sys.stderr, flush=True))
    if options.kernels == "engine":
        from flexbatch.calibrate.kernels import kernel_rates

        kernels = kernel_rates(device, phases)
    hardware = measure(device, options.offload_dir, kernels, phases, disk)
    if device == "cuda" and (gpus := torch.cuda.device_count()) > 1:
        hardware = with_interconnect(hardware, gpus)
    write_hardware(hardware, options.output)
    print(f"{hardware.name}: measured in {time.perf_counter() - start:.1f} s -> {options.output}", file=sys.stderr)
    print(f"  {phases.text}", file=sys.stderr)
    for name, error in hardware.fit_error.items():
        print(f"  fit error of {name}: {error:.1%}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        check(options)
        with data_apart():
            write_profile(options)
    except KeyboardInterrupt:
        print("flexbatch profile: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except (ConfigurationError, OSError) as error:
        print(f"flexbatch profile: {error}", file=sys.stderr)
        return USAGE
    return DONE


if __name__ == "__main__":
    sys.exit(run_process(main))
