"""Draws docs/figures/how_it_works.{png,svg}: ``python -m docs.figures.how_it_works``.

The tiles on the left are a sketch; the curves and the entries that are kept are measured on data like
a language model's (bench/llm_data.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from bench.llm_data import llm_like
from bench.plots import save
from cce_ext.sparse.tail import GROUP

N, V, D = 192, 32768, 512
THRESHOLD = 2.0**-13
GREEN, RED, GREY = "#0b6e4f", "#b3261e", "#d7d7d7"


def probabilities() -> tuple[Tensor, Tensor]:
    """p (N, V) of rows like a language model's, and targets (N,)."""
    e, c, targets = llm_like(N, V, D, torch.float32, "cpu")
    return torch.softmax(e @ c.T, -1), targets


def draw_forward(axes: Axes) -> None:
    """The logits as tiles, of which one exists at a time."""
    rows, columns, done = 5, 9, 23
    for i in range(rows * columns):
        x, y = i % columns, rows - 1 - i // columns
        colour = GREEN if i == done else GREY if i < done else "white"
        axes.add_patch(
            Rectangle((x, y), 0.94, 0.94, facecolor=colour, edgecolor="#999999", linewidth=0.6)
        )
    for y in range(rows):
        axes.add_patch(
            Rectangle(
                (columns + 0.5, y), 0.94, 0.94, facecolor="#cfe6dc", edgecolor=GREEN, linewidth=0.6
            )
        )
        axes.add_patch(Rectangle((-1.6, y), 1.1, 0.94, facecolor="#dce4f2", edgecolor="#3d5a98"))
    axes.add_patch(
        Rectangle((0, rows + 0.5), columns - 0.06, 0.9, facecolor="#dce4f2", edgecolor="#3d5a98")
    )
    axes.text(-1.05, rows / 2, "E", ha="center", va="center")
    axes.text(columns / 2, rows + 0.95, "Cᵀ", ha="center", va="center")
    axes.text(columns + 0.97, rows + 0.25, "max, Σ", ha="center", fontsize=8, color=GREEN)
    axes.text(
        columns / 2, -0.75,
        "one tile of logits at a time, in registers:\nused and forgotten; each row keeps a maximum and a sum",
        ha="center", va="top", fontsize=8,
    )  # fmt: skip
    axes.set(
        xlim=(-1.8, columns + 1.6), ylim=(-2.2, rows + 1.6), title="Forward: no logits in memory"
    )
    axes.set_aspect("equal")
    axes.axis("off")


def draw_rows(axes: Axes, p: Tensor) -> None:
    """Each row's probabilities in falling order, and where the threshold cuts."""
    rank = torch.arange(1, V + 1)
    for row in p[:: N // 48].sort(-1, descending=True).values:
        axes.plot(rank, row, color=GREEN, alpha=0.25, linewidth=0.7, rasterized=True)
    axes.axhline(THRESHOLD, color=RED, linewidth=1)
    kept = (p >= THRESHOLD).sum(1).float().median().item()
    mass = p.where(p < THRESHOLD, 0).sum(1).mean().item()
    axes.text(1.2, THRESHOLD / 1.5, "threshold 2⁻¹³", color=RED, fontsize=8, va="top")
    axes.text(
        0.97, 0.95, f"kept: {kept:.0f} of {V:,} (median)\nbelow: {mass:.1%} of the mass",
        transform=axes.transAxes, ha="right", va="top", fontsize=8,
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", ylim=(1e-9, 1), xlabel="rank", ylabel="probability")
    axes.set_title("A row's softmax is nearly empty")
    axes.spines[["top", "right"]].set_visible(False)


def draw_backward(axes: Axes, p: Tensor, targets: Tensor) -> None:
    """Kept entries as dots over the groups whose mass is spread by a shape."""
    kept = (p >= THRESHOLD).nonzero()
    for group in range(-(-V // GROUP)):
        shade = "#f2f2f2" if group % 2 else "#e4e4e4"
        axes.axvspan(group * GROUP, min((group + 1) * GROUP, V), color=shade, linewidth=0)
    axes.plot(kept[:, 1], kept[:, 0], ",", color=GREEN, rasterized=True)
    axes.plot(targets, torch.arange(N), ".", color=RED, markersize=2)
    axes.set(xlim=(0, V), ylim=(N, 0), xlabel="vocabulary", ylabel="tokens")
    axes.set_xticks([0, V // 2, V], ["0", f"{V // 2:,}", f"{V:,}"])
    axes.set_title("Backward: kept entries, and a tail")
    axes.text(
        0.5, -0.27,
        f"dots: entries above the threshold, exact (red: targets)\nshades: groups of {GROUP} ids; what a row "
        "drops in one is spread by the\nshape of its class, which for dE leans the way its own logits do",
        transform=axes.transAxes, ha="center", va="top", fontsize=8,
    )  # fmt: skip


def draw() -> Figure:
    """All three parts."""
    p, targets = probabilities()
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    parts = figure.subplots(1, 3, width_ratios=(1.15, 1, 1.1))
    draw_forward(parts[0])
    draw_rows(parts[1], p)
    draw_backward(parts[2], p, targets)
    return figure


if __name__ == "__main__":
    for path in save(draw(), Path(__file__).parent, "how_it_works"):
        print(path)
