"""Figures of a run as PNG and SVG: ``python -m bench.plots RUN.json --out FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.accuracy import ROUNDED, threshold
from bench.problems import DTYPES
from bench.results import Results, headline, load

Row = dict[str, Any]
# A method has one colour in every figure.
_COLOURS = {
    "cce": "#0b6e4f",
    "cce_exact": "#69b578",
    "torch_compile": "#e08e1b",
    "eager": "#b3261e",
    "matmul": "#222222",
}
_OTHERS = ("#3d5a98", "#7b4fa3", "#c2529b", "#5f9ea0", "#8d6e63")
_MARKERS = "osD^vP*X"


class _Style:
    """Colours and markers by method, the same wherever it appears."""

    def __init__(self, rows: list[Row]) -> None:
        self.methods = list(dict.fromkeys(row["method"] for row in rows))
        self.methods = [m for m in self.methods if m not in ("inputs", ROUNDED)]
        others = iter(_OTHERS * 9)
        self.colour = {m: _COLOURS.get(m) or next(others) for m in self.methods}
        self.marker = {m: _MARKERS[i % len(_MARKERS)] for i, m in enumerate(self.methods)}


def _ran(rows: list[Row], *needed: str) -> list[Row]:
    return [row for row in rows if all(row.get(name) is not None for name in needed)]


def speed(results: Results) -> Figure | None:
    """Bars: forward + backward over the matmul, by model and method."""
    rows = [
        row
        for row in _ran(results.sections.get("speed", []), "x_matmul")
        if row["kind"] == "loss-fw-bw" and not row["softcap"] and not row["rank"]
    ]
    largest = {row["test_data"]: row["n"] for row in rows if row["n"] == 8192} or {
        row["test_data"]: row["n"] for row in rows
    }
    rows = [row for row in rows if largest.get(row["test_data"]) == row["n"]]
    # Of the first data and dtype alone: a bar has room for one number.
    rows = [row for row in rows if all(row[k] == rows[0][k] for k in ("data", "dtype"))]
    if not rows:
        return None
    style = _Style(rows)
    shapes = list(dict.fromkeys(row["test_data"] for row in rows))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(style.methods)
    for i, method in enumerate(style.methods):
        mine = {row["test_data"]: row for row in rows if row["method"] == method}
        at = [shapes.index(shape) + (i - (len(style.methods) - 1) / 2) * width for shape in mine]
        heights = [row["x_matmul"] for row in mine.values()]
        bars = axes.bar(at, heights, width, label=method, color=style.colour[method])
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axhline(1, color=_COLOURS["matmul"], linewidth=1, linestyle="--")
    axes.text(axes.get_xlim()[1], 1, " matmul", va="center", fontsize=8)
    axes.set_xticks(range(len(shapes)), [f"{s}\nN = {largest[s]}" for s in shapes])
    axes.set_ylabel("forward + backward, x matmul")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    axes.set_title(f"{results.machine['name']}, {rows[0]['data']} data", fontsize=10)
    return figure


def scaling(results: Results, axis: str) -> Figure | None:
    """Time and memory of a step over N, V or D, on doubly logarithmic axes."""
    rows = [r for r in results.sections.get("scaling", []) if r["test_data"] == axis]
    timed = [r for r in _ran(rows, "runtime_ms") if r["kind"] in ("loss-fw-bw", "matmul")]
    if not timed:
        return None
    style = _Style(timed)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    column = axis.lower()
    for method in style.methods:
        look = dict(color=style.colour[method], marker=style.marker[method], markersize=4)
        mine = [r for r in timed if r["method"] == method]
        label = "matmul alone" if method == "matmul" else method
        dash = "--" if method == "matmul" else "-"
        x = [r[column] for r in mine]
        left.plot(x, [r["runtime_ms"] for r in mine], dash, label=label, **look)
        mine = [r for r in _ran(mine, "op_mem_mb") if r["op_mem_mb"] > 0]
        if mine:
            right.plot([r[column] for r in mine], [r["op_mem_mb"] for r in mine], **look)
    gradients = {r[column]: r["op_mem_mb"] - r["extra_mb"] for r in _ran(timed, "extra_mb")}
    if gradients:
        right.plot(
            list(gradients), list(gradients.values()), "k--", linewidth=1, label="gradients alone"
        )
        right.legend(frameon=False, fontsize=8)
    sizes = sorted({r[column] for r in rows})
    for axes, title in ((left, "forward + backward, ms"), (right, "memory beyond inputs, MB")):
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=title)
        axes.set_xticks(
            sizes, [f"{s // 1000}k" if s >= 10000 else str(s) for s in sizes], fontsize=8
        )
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    fixed = ", ".join(f"{k.upper()} = {_most(rows, k)}" for k in "nvd" if k != column)
    figure.suptitle(f"{results.machine['name']}, {rows[0]['dtype']}, {fixed}", fontsize=10)
    return figure


def _most(rows: list[Row], column: str) -> int:
    values = [r[column] for r in rows]
    return max(set(values), key=values.count)


def roofline(results: Results) -> Figure | None:
    """The forward's throughput over its arithmetic intensity, under the machine's measured roof.

    Work is 2 N V D for every method; bytes are those that no method can avoid, E and C once, and for
    the matmul the logits it writes."""
    roof = {row["name"]: row for row in results.sections.get("roof", [])}
    rows = [
        row
        for section in ("speed", "scaling")
        for row in _ran(results.sections.get(section, []), "runtime_ms")
        if row["kind"] in ("loss-fw", "matmul") and not row.get("rank")
    ]
    if not roof or not rows:
        return None
    peak, bandwidth = roof["matmul"]["tflops"], roof["copy"]["gb_per_s"] / 1e3
    style = _Style(rows)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    low, high = 1e9, 0.0
    for method in style.methods:
        points = []
        for row in (r for r in rows if r["method"] == method):
            n, v, d = row["n"], row["v"], row["d"]
            size = DTYPES[row["dtype"]].itemsize
            moved = size * (n * d + v * d + (n * v if method == "matmul" else 0))
            work = 2 * n * v * d
            points.append((work / moved, work / row["runtime_ms"] / 1e9))
        x, y = zip(*points, strict=True)
        low, high = min(low, *x), max(high, *x)
        axes.scatter(
            x, y, s=14, color=style.colour[method], marker=style.marker[method], label=method
        )
    x = [low / 2, max(peak / bandwidth, low / 2), max(high * 2, 2 * peak / bandwidth)]
    axes.plot(x, [min(peak, bandwidth * value) for value in x], color="#222222", linewidth=1)
    label = (
        f"matmul of {roof['matmul']['size']}: {peak:.3g} TFLOP/s; copy: {bandwidth * 1e3:.3g} GB/s"
    )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="forward, TFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{results.machine['name']}; measured roof, {label}", fontsize=9)
    return figure


def accuracy(results: Results) -> Figure | None:
    """Dots: errors of both gradients by case and method, with what rounding alone costs."""
    rows = [
        {**row, "label": f"{row['case']}\nN = {row['n']}"}
        for row in _ran(results.sections.get("accuracy", []), "de_error")
        if row["n"] > 1 and not threshold(row)
    ]
    if not rows:
        return None
    style = _Style(rows)
    cases = list(dict.fromkeys(row["label"] for row in rows))[::-1]
    figure = Figure(figsize=(10, 1.2 + 0.6 * len(cases)), layout="constrained")
    for axes, (quantity, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("de_error", "error of dE"), ("dc_error", "error of dC")),
        strict=True,
    ):
        for method in (*style.methods, ROUNDED):
            mine = [row for row in rows if row["method"] == method]
            look = dict(color=style.colour[method], marker=style.marker[method], s=24) if method != ROUNDED else dict(
                color="#888888", marker="|", s=120
            )  # fmt: skip
            at = [cases.index(row["label"]) for row in mine]
            axes.scatter([row[quantity] for row in mine], at, label=method, **look)
        axes.set(xscale="log", title=title)
        axes.set_yticks(range(len(cases)), cases, fontsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8
    )
    return figure


def thresholds(results: Results) -> Figure | None:
    """Lines: errors of the default backward over its threshold, a case each; dashed, eager."""
    rows = [r for r in _ran(results.sections.get("accuracy", []), "de_error") if r["n"] > 64]
    swept = [row for row in rows if threshold(row) and row["method"].startswith("cce")]
    if not swept:
        return None
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    cases = list(dict.fromkeys(row["case"] for row in swept))
    for axes, (quantity, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("de_error", "error of dE"), ("dc_error", "error of dC")),
        strict=True,
    ):
        for i, case in enumerate(cases):
            mine = sorted((threshold(r), r[quantity]) for r in swept if r["case"] == case)
            colour = f"C{i}"
            axes.plot(*zip(*mine, strict=True), "o-", color=colour, markersize=4, label=case)
            for row in rows:
                if row["case"] == case and row["method"] == "eager":
                    axes.axhline(row[quantity], color=colour, linestyle="--", linewidth=0.8)
        axes.set(yscale="log", xlabel="K of the threshold 2^-K", title=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8
    )
    return figure


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "speed": speed,
    "scaling_n": lambda results: scaling(results, "N"),
    "scaling_v": lambda results: scaling(results, "V"),
    "scaling_d": lambda results: scaling(results, "D"),
    "roofline": roofline,
    "accuracy": accuracy,
    "thresholds": thresholds,
}


def save(figure: Figure, folder: Path, name: str, note: str = "") -> list[Path]:
    """Writes NAME.png and NAME.svg; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(paths[0], dpi=150, metadata={"Description": note, "Software": None})
        figure.savefig(paths[1], metadata={"Description": note, "Date": None})
    return paths


def draw(results: Results, folder: Path) -> list[Path]:
    """All figures that the run has numbers for."""
    paths: list[Path] = []
    for name, make in FIGURES.items():
        figure = make(results)
        if figure is not None:
            paths += save(figure, folder, name, f"{headline(results)}; {results.command}")
    return paths


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", type=Path, help="JSON of bench, bench.scaling, bench.accuracy or bench.full"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    for path in draw(load(args.run), args.out):
        print(path)


if __name__ == "__main__":
    main()
