"""Which cores and memory are near a GPU, by what Linux says of its place on the PCI bus.

Copies to and from memory of another socket's node go over the link between sockets: on hosts of two sockets that was
seen to cost a third of a GPU's link. New pages come from the node of the core that touches them first, and so do
pinned ones; a rank that runs on the right cores has its memory there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

SYSTEM = Path("/sys")


def pci_name(domain: int, bus: int, device: int) -> str:
    """As the folders of Linux are named; a GPU is function 0 of its device."""
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def cores_in(text: str) -> frozenset[int]:
    """Of a list such as ``0-15,32-47``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def nodes(system: Path = SYSTEM) -> dict[int, frozenset[int]]:
    """The cores of every node that has some; nodes of memory alone are no place to run on."""
    found = {}
    for folder in (system / "devices/system/node").glob("node[0-9]*"):
        cores = cores_in((folder / "cpulist").read_text())
        if cores:
            found[int(folder.name.removeprefix("node"))] = cores
    return found


def cores_near(pci: str, system: Path = SYSTEM) -> frozenset[int]:
    """Of the node that a PCI device is attached to; none where there is one node, or Linux does not say which."""
    try:
        of_node = nodes(system)
        node = int((system / "bus/pci/devices" / pci.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return frozenset()
    return of_node.get(node, frozenset()) if len(of_node) > 1 else frozenset()


def threads_near(near: Sequence[frozenset[int]], number: int, threads: int) -> int:
    """Of a rank that would have ``threads``, on the node of its GPU ``number``. near: the cores of the node of every
    GPU whose rank runs on this host, as far as this process sees it."""
    return max(1, min(threads, len(near[number]) // near.count(near[number])))


def run_on(cores: Iterable[int], threads: Iterable[int] | None = None) -> Callable[[], None]:
    """Have this process, all threads that it has, and those that they start run on some of the cores that it may run
    on; returns what undoes it. Nothing happens where it may run on none of them."""
    if threads is None:
        threads = [int(thread) for thread in os.listdir("/proc/self/task")]
    before = {}
    for thread in threads:
        try:
            allowed = os.sched_getaffinity(thread)
            if chosen := allowed & set(cores):
                os.sched_setaffinity(thread, chosen)
                before[thread] = allowed
        except OSError:
            continue  # it has ended

    def undo() -> None:
        for thread, allowed in before.items():
            try:
                os.sched_setaffinity(thread, allowed)
            except OSError:
                continue

    return undo


def run_near(device: torch.device, local_ranks: int) -> Callable[[], None]:
    """Have this process run, and get its memory, where its GPU is attached; returns what undoes it. local_ranks: of
    this host, which share the cores of a node where their GPUs are attached to the same one."""
    number = device.index or 0
    near = [cores_near_gpu(each) for each in range(max(number + 1, min(local_ranks, torch.cuda.device_count())))]
    if cores := near[number]:
        torch.set_num_threads(threads_near(near, number, torch.get_num_threads()))
    return run_on(cores)


def cores_near_gpu(number: int) -> frozenset[int]:
    """Of the node of a GPU; none where nobody says which it is."""
    found = torch.cuda.get_device_properties(number)
    # Older versions of torch do not say where a GPU is.
    domain, bus, slot = (getattr(found, f"pci_{part}_id", -1) for part in ("domain", "bus", "device"))
    return cores_near(pci_name(domain, bus, slot)) if bus >= 0 else frozenset()
