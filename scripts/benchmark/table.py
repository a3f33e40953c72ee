"""Benchmark results as Markdown tables and as a figure."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scripts.common.markdown import markdown_table

Results = dict[str, dict[str, Any]]


def markdown(results: Results) -> str:
    """Tables of time, throughput and memory, with ratios to ours."""
    parts = []
    for scenario, title in (
        ("mix", "8 documents of 1–20 chunks of 512 tokens (49 in total), one training pass"),
        ("whole", "2 documents of 20 chunks of 512 tokens, one training pass"),
        ("roofline 256", "The mix at 256 tokens per chunk, against the bare encoder on the same number of tokens"),
        ("roofline 512", "The mix at 512 tokens per chunk, against the bare encoder on the same number of tokens"),
    ):
        if systems := results.get(scenario):
            parts.append(f"**{title}**\n\n{systems_table(systems)}")
    if any(name.startswith("growth") for name in results):
        parts.append(f"**One document of increasing length, in chunks of 256 tokens**\n\n{growth_table(results)}")
    if frozen := results.get("frozen", {}).get("frozen encoder"):
        parts.append(
            f"**Frozen encoder**: first epoch {frozen['seconds']:.2f} s (encodes every chunk), later epochs "
            f"{frozen['later_seconds']:.4f} s: {frozen['seconds'] / frozen['later_seconds']:.0f} times faster."
        )
    if ranks := results.get("ranks"):
        rows = [[number, f"{even['dealt out']:.3f}", f"{even['random']:.3f}"] for number, even in ranks.items()]
        table = markdown_table(["ranks", "balanced order", "random order"], rows)
        parts.append(f"**Load balance: mean ÷ maximum cost over ranks (simulated)**\n\n{table}")
    return "\n\n".join(parts) + "\n"


def systems_table(systems: dict[str, Any]) -> str:
    ours = systems["ours"]
    head = ["", "seconds", "documents/s", "real tokens/s", "peak MiB above the model", "time ÷ ours", "memory ÷ ours"]
    rows = []
    for name, result in systems.items():
        seconds, peak = result["seconds"], result["peak_mib"]
        speeds = [f"{seconds:.2f}", f"{ours['documents'] / seconds:.2f}", f"{ours['tokens'] / seconds:,.0f}"]
        ratios = [f"{seconds / ours['seconds']:.2f}", f"{peak / ours['peak_mib']:.2f}"]
        rows.append([name, *speeds, f"{peak:,.0f}", *ratios])
    return markdown_table(head, rows)


def growth_of(results: Results) -> dict[str, list[tuple[int, float, float]]]:
    """System → (chunks, seconds, peak MiB) of each length."""
    growth: dict[str, list[tuple[int, float, float]]] = {}
    for scenario, systems in results.items():
        if scenario.startswith("growth"):
            for name, result in systems.items():
                growth.setdefault(name, []).append((int(scenario.split()[1]), result["seconds"], result["peak_mib"]))
    return growth


def growth_table(results: Results) -> str:
    growth = growth_of(results)
    numbers = sorted({chunks for rows in growth.values() for chunks, _, _ in rows})
    cells = {
        name: {chunks: f"{seconds:.2f}, {peak:,.0f}" for chunks, seconds, peak in rows} for name, rows in growth.items()
    }
    table = [[name, *(of.get(number, "") for number in numbers)] for name, of in cells.items()]
    lines = [markdown_table(["seconds, MiB", *numbers], table)]
    for name, rows in growth.items():
        long = np.array([(chunks, seconds) for chunks, seconds, _ in rows if 5 <= chunks <= 200])
        if len(long) > 3:
            slope = np.polyfit(np.log(long[:, 0]), np.log(long[:, 1]), 1)[0]
            lines.append(f"\n{name}: time grows with the number of chunks to the power {slope:.3f} (5 to 200 chunks).")
        peaks = {chunks: peak for chunks, _, peak in rows}
        for many in (200, 2000):
            if many in peaks and 20 in peaks:
                lines.append(f"\n{name}: peak memory of {many} chunks ÷ of 20: {peaks[many] / peaks[20]:.2f}.")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Plot time and memory against the number of chunks of a document."""
    growth = growth_of(results)
    if not growth:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, rows in growth.items():
        chunks, seconds, peaks = zip(*sorted(rows), strict=True)
        axes[0].plot(chunks, seconds, marker="o", label=name)
        axes[1].plot(chunks, peaks, marker="o", label=name)
    for axis, title in zip(axes, ("seconds per training pass", "peak MiB above the loaded model"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="chunks per document (256 tokens each)", title=title)
        axis.grid(visible=True, alpha=0.3)
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter("{x:,g}")
    axes[1].yaxis.set_minor_formatter("{x:,g}")
    axes[1].tick_params(which="minor", labelsize=8)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
