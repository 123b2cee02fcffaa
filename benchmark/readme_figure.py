"""The figure of the README: generated tokens per second beside other engines, from committed results.

    python -m benchmark.readme_figure docs/throughput.svg

Only whole jobs, measured on one machine in one hour, with random distinct prompts and plans that the engine chose.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "peers-gpu.json"
NAMES = {"flexllmgen": "FlexGen", "flexbatch": "FlexBatch", "vllm": "vLLM", "swiftllm": "SwiftLLM"}
PANELS = (
    ("opt-30b", "OPT-30B in 16 GiB, prompt 512, generate 32"),
    ("llama-3-8b", "Llama-3-8B, all on the GPU, ragged prompts, generate 128"),
)


def bars(model: str) -> list[tuple[str, float]]:
    """(engine, generated tokens per second) of one model, slowest first."""
    runs = json.loads(RESULTS.read_text())["h100"]["runs"]
    found = {NAMES[run["who"].split()[0]]: run["tok_s"] for run in runs if run["model"] == model}
    return sorted(found.items(), key=lambda pair: pair[1])


def draw(path: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "flexbatch"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(PANELS), 1, figsize=(8, 3.4), layout="constrained")
    for axis, (model, title) in zip(axes, PANELS, strict=True):
        names, values = zip(*bars(model), strict=True)
        colors = ["#2f6fde" if name == "FlexBatch" else "#b8bfca" for name in names]
        drawn = axis.barh(names, values, color=colors, height=0.65)
        axis.bar_label(drawn, [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values], padding=4)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlim(0, 1.12 * max(values))
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.supxlabel("generated tokens per second, whole job, one H100", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(sys.argv[1])
