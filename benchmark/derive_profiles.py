"""Profiles of cards that people have and this project has not measured, from published figures:

    python -m benchmark.derive_profiles            # writes policy/profiles/*.json

What a vendor publishes (memory, bandwidth, dense 16-bit matrix rate, the generation of the bus) is multiplied by the
share of the same figure that one H200 was measured to reach (policy/profiles/h200.json). Fixed costs are the H200
host's. The host is one that such a card is commonly found in, with the figures of its memory. So a derived profile
says what a machine of the kind could do with this engine; measuring it (python -m flexbatch.calibrate.profile) says
what one does.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from flexbatch.policy.card_names import SHIPPED
from flexbatch.policy.curve import Curve
from flexbatch.policy.hardware import Hardware, load_hardware
from flexbatch.policy.units import GIB

GB, TFLOPS = 10**9, 10**12
LINK_BYTES = {3: 15.754 * GB, 4: 31.508 * GB, 5: 63.015 * GB}
"""One direction of 16 lanes of PCI Express: 8, 16 and 32 GT/s, 128 of 130 bits."""


@dataclass(frozen=True)
class Card:
    """``memory`` in GiB as the driver shows it, ``bandwidth`` in GB/s, ``matrix`` in TFLOP/s of dense 16-bit
    multiplication with 32-bit sums, ``link`` the generation of PCI Express, ``nvlink`` GB/s to other GPUs in one
    direction, 0 for cards that reach them through the host."""

    name: str
    memory: float
    bandwidth: float
    matrix: float
    link: int
    source: str
    nvlink: float = 0.0


@dataclass(frozen=True)
class Host:
    """``memory`` in GiB, ``bandwidth`` in GB/s of all channels, ``disk_read`` and ``disk_write`` in GB/s."""

    name: str
    memory: float
    bandwidth: float
    disk_read: float
    disk_write: float


DESKTOP = Host("a desktop with two channels of DDR5-5600 and an NVMe disk", 64, 89.6, 7.0, 5.0)
OLDER_DESKTOP = Host("a desktop with two channels of DDR4-3200 and an NVMe disk", 64, 51.2, 7.0, 5.0)
CLOUD = Host("a cloud instance with four channels of DDR4-3200 and a local NVMe disk", 64, 102.4, 3.0, 1.5)
SERVER_DDR4 = Host("a server with eight channels of DDR4-3200 and a local NVMe disk", 128, 204.8, 3.0, 1.5)
SERVER_DDR5 = Host("a server with eight channels of DDR5-4800 and a local NVMe disk", 128, 307.2, 3.0, 1.5)

REFERENCE = Card("NVIDIA H200", 139.8, 4800, 989.4, 5, "NVIDIA H200 data sheet", 450)
REFERENCE_HOST = Host("16 Xeon cores, eight channels of DDR5-4800", 114.6, 307.2, 3.1, 0.93)

MACHINES: dict[str, tuple[Card, Host]] = {
    "l4": (Card("NVIDIA L4", 22.5, 300, 121, 4, "NVIDIA L4 data sheet (242 TFLOP/s with sparsity)"), CLOUD),
    "rtx-3090": (
        Card("NVIDIA GeForce RTX 3090", 23.7, 936, 71, 4, "NVIDIA Ampere GA102 whitepaper, table 9"),
        OLDER_DESKTOP,
    ),
    "rtx-4090": (
        Card("NVIDIA GeForce RTX 4090", 23.6, 1008, 165.2, 4, "NVIDIA Ada GPU architecture whitepaper, table 2"),
        DESKTOP,
    ),
    "rtx-5090": (
        Card("NVIDIA GeForce RTX 5090", 31.4, 1792, 209.5, 5, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
        DESKTOP,
    ),
    "a100": (Card("NVIDIA A100 SXM 80 GB", 79.2, 2039, 312, 4, "NVIDIA A100 data sheet", 300), SERVER_DDR4),
    "a100-40gb": (Card("NVIDIA A100 SXM 40 GB", 39.4, 1555, 312, 4, "NVIDIA A100 data sheet", 300), SERVER_DDR4),
    "h100": (Card("NVIDIA H100 SXM 80 GB", 79.1, 3352, 989.4, 5, "NVIDIA H100 data sheet", 450), SERVER_DDR5),
}
NVLINK_SHARE = 0.8
"""Of NVLink's rate, what sums over GPUs reach by NCCL's published tests: 360 of 450 GB/s on H100s."""
SUM_SECONDS = 20e-6
"""Of one sum of few bytes over GPUs of a host, launch included."""
RESERVED_SHARE = 0.04
"""Of a card's memory, for the context and libraries: at least 0.5 GiB, at most what the H200's profile has."""


def scaled(curve: Curve, factor: float) -> Curve:
    return Curve(curve.points, tuple(value * factor for value in curve.values))


def gemm_curve(measured: Hardware, card: Card) -> Curve:
    """Few tokens are bound by reading the weights, many by the matrix rate: each measured point is scaled by whichever
    of both figures gives less."""
    by_memory, by_matrix = card.bandwidth / REFERENCE.bandwidth, card.matrix / REFERENCE.matrix
    best = max(measured.gemm.values)
    ridge = [point * measured.gpu_bandwidth for point in measured.gemm.points]  # 2 FLOP for the 2 bytes of a weight
    values = [
        min(value * by_memory if at < best else at * by_memory, value * by_matrix if at >= best else best * by_matrix)
        for value, at in zip(measured.gemm.values, ridge, strict=True)
    ]
    return Curve(measured.gemm.points, tuple(itertools.accumulate(values, max)))


def interconnect(card: Card, measured: Hardware) -> float:
    """Bytes a second from GPU to GPU: a share of NVLink, or through the host, whose memory is written and read."""
    if card.nvlink:
        return NVLINK_SHARE * card.nvlink * GB
    return measured.d2h * LINK_BYTES[card.link] / LINK_BYTES[REFERENCE.link] / 2


def derived(card: Card, host: Host, measured: Hardware) -> Hardware:
    """The machine of a card in a host, by the shares of the published figures that the measured machine reaches."""
    memory, matrix = card.bandwidth / REFERENCE.bandwidth, card.matrix / REFERENCE.matrix
    link = LINK_BYTES[card.link] / LINK_BYTES[REFERENCE.link]
    of_host = host.bandwidth / REFERENCE_HOST.bandwidth
    h2d = measured.h2d * link
    attention = scaled(measured.cpu_attention, of_host)
    # The link takes its bytes from the same host memory: the same share of both is lost.
    beside = measured.cpu_attention_during_h2d / measured.cpu_attention.values[0]
    left = (measured.host_bandwidth * of_host - h2d) / attention.values[0]
    return dataclasses.replace(
        measured,
        name=f"{card.name} in {host.name}, PCIe {card.link} x16",
        gpu_memory_bytes=int(card.memory * GIB),
        cpu_memory_bytes=int(host.memory * GIB),
        disk_bytes=10**12,
        h2d=h2d,
        d2h=measured.d2h * link,
        link_both=min(measured.link_both * link, measured.host_bandwidth * of_host),
        gather=measured.gather * link,
        scatter=measured.scatter * link,
        disk_read=host.disk_read * GB,
        disk_write=host.disk_write * GB,
        gemm=gemm_curve(measured, card),
        gpu_bandwidth=measured.gpu_bandwidth * memory,
        attention_decode=measured.attention_decode * memory,
        attention_prefill=measured.attention_prefill * matrix,
        prompt_expand_8=measured.prompt_expand_8 * matrix,
        prompt_expand_4=measured.prompt_expand_4 * matrix,
        attention_expand=measured.attention_expand * memory,
        expand=measured.expand * memory,
        cpu_attention=attention,
        cpu_attention_8=measured.cpu_attention_8 and scaled(measured.cpu_attention_8, of_host),
        cpu_attention_4=measured.cpu_attention_4 and scaled(measured.cpu_attention_4, of_host),
        cpu_attention_during_h2d=attention.values[0] * max(0.1, min(beside, left)),
        cpu_experts=measured.cpu_experts and scaled(measured.cpu_experts, of_host),
        cpu_experts_8=measured.cpu_experts_8 and scaled(measured.cpu_experts_8, of_host),
        cpu_experts_4=measured.cpu_experts_4 and scaled(measured.cpu_experts_4, of_host),
        interconnect=interconnect(card, measured),
        interconnect_seconds=SUM_SECONDS,
        h2d_during_cpu_attention=measured.h2d_during_cpu_attention * link,
        host_bandwidth=measured.host_bandwidth * of_host,
        gpu_reserved_bytes=int(min(measured.gpu_reserved_bytes, max(GIB / 2, RESERVED_SHARE * card.memory * GIB))),
        origin="derived",
        fit_error={},
        source={
            "published": f"{card.memory} GiB, {card.bandwidth} GB/s, {card.matrix} dense 16-bit TFLOP/s, PCIe "
            f"{card.link} x16, {f'NVLink {card.nvlink} GB/s' if card.nvlink else 'no NVLink'}: {card.source}",
            "assumed host": f"{host.name}: {host.memory} GiB, {host.bandwidth} GB/s, disk {host.disk_read} GB/s read "
            f"and {host.disk_write} GB/s written, 1 TB free",
            "derived": "python -m benchmark.derive_profiles: rates by the shares of its published figures that the "
            "H200 of h200.json reached, fixed costs as measured there. Not measured: measure your own machine",
        },
    )


def profiles() -> dict[str, str]:
    """The text of every derived profile, by its file's name."""
    measured = load_hardware("h200")
    return {f"{name}.json": derived(*parts, measured).to_json() + "\n" for name, parts in MACHINES.items()}


def main(folder: Path = SHIPPED) -> int:
    for name, text in profiles().items():
        (folder / name).write_text(text)
        print(folder / name, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
