"""``flexbatch profile -o hardware.json``: measures this machine for the policy optimizer.

Exit codes: 0 done, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flexbatch.policy.command_line import Parser
from flexbatch.policy.stdout import data_apart, run_process
from flexbatch.validation.devices import check_device
from flexbatch.validation.errors import DONE, INTERRUPTED, USAGE, ConfigurationError, LostRankError

if TYPE_CHECKING:
    from flexbatch.calibrate.engine_kernels import EngineKernels
    from flexbatch.calibrate.interconnect import WaitingRanks
    from flexbatch.calibrate.phases import Phases
    from flexbatch.policy.hardware import Hardware


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "flexbatch profile",
        description="Measure this machine for the policy optimizer: links, kernels, host, disk, and what is between "
        "its GPUs. Takes about 30 s on an idle machine, and 10 s more where it has several GPUs. Every run measures by "
        "itself at first use; this is for other machines' plans.",
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
    from flexbatch.calibrate.phases import Phases, process_age
    from flexbatch.calibrate.profile_file import write_hardware

    phases = Phases(lambda line: print(line, file=sys.stderr, flush=True), earlier_seconds=process_age())
    print("starting", file=sys.stderr, flush=True)
    hardware, compilers = measured(options, phases)
    write_hardware(hardware, options.output)
    took, *parts = reversed(phases.text.rsplit("; ", 1))
    print(f"{hardware.name}: measured, {took} -> {options.output}", file=sys.stderr)
    for line in (*parts, compilers, *fit_errors(hardware)):
        if line:
            print(f"  {line}", file=sys.stderr)


def measured(options: argparse.Namespace, phases: Phases) -> tuple[Hardware, str]:
    """The machine, and what its compilers did."""
    from flexbatch.execution.garbage import frozen_heap, no_collection

    with contextlib.ExitStack() as stack:
        with no_collection():
            device, engine = begun(options, stack)
            import torch

            from flexbatch.calibrate.measure import measure  # beside the compilers

            stack.enter_context(frozen_heap())  # or the first collection goes through all of it

        gpus = torch.cuda.device_count() if device == "cuda" else 1
        if gpus > 1:
            from flexbatch.calibrate.interconnect import WaitingRanks

            ranks = stack.enter_context(contextlib.closing(WaitingRanks(device, gpus)))
        phases.passed("starting")
        hardware = measure(device, options.offload_dir, engine, phases)
        if gpus > 1:
            hardware = with_others(hardware, gpus, ranks, phases)
    return hardware, engine.text if engine is not None else ""


def begun(options: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[str, EngineKernels | None]:
    """The device, with torch imported, and the engine's kernels, whose compilers ``stack`` ends."""
    from flexbatch.calibrate.early_gpu import begin_gpu

    opening = begin_gpu(options.device) if options.device != "cpu" else None
    import torch

    from flexbatch.calibrate.engine_kernels import EngineKernels

    if opening is not None:
        opening.join()
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if options.kernels != "engine":
        return device, None
    engine = EngineKernels(device)
    stack.push(engine.ahead)
    engine.begin()
    return device, engine


def with_others(hardware: Hardware, gpus: int, ranks: WaitingRanks, phases: Phases) -> Hardware:
    """With what is between this machine's GPUs, where that can be measured."""
    from flexbatch.calibrate.interconnect import with_interconnect

    try:
        with phases.of(f"what is between {gpus} GPUs"):
            return with_interconnect(hardware, gpus, ranks)
    except (LostRankError, RuntimeError) as error:
        told = f"what is between GPUs was not measured, and counts as the bus: {error}"
        print(f"flexbatch profile: {told}", file=sys.stderr)
        return hardware


def fit_errors(hardware: Hardware) -> list[str]:
    return [f"fit error of {name}: {error:.1%}" for name, error in hardware.fit_error.items()]


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
