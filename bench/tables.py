"""Writes the tables of the documents from committed runs: ``python -m bench.tables [--check]``.

A table stands between two comments, the first of which names its kind and its file:

    <!-- table: steps docs/results/cpu.json -->
    <!-- end of table -->

A file that does not exist leaves what stands there alone. ``--check`` writes nothing and fails if
anything would change.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.accuracy import ALGORITHM, ROUNDED, threshold
from bench.results import ROOT, Results, commit_text, load

Row = dict[str, Any]
_BLOCK = re.compile(r"(<!-- table: (\w+) (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
_KINDS = {
    "loss-fw": "forward",
    "loss-fw-train": "forward, training",
    "loss-bw": "backward",
    "loss-fw-bw": "forward + backward",
}
DOCUMENTS = ("README.md", "docs/*.md")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def source(results: Results) -> str:
    """Where numbers come from, in a sentence."""
    facts = results.machine
    where = facts["name"]
    if facts["device"] == "cpu":
        where = f"a CPU with {facts['capability']}, {facts['threads']} threads"
    return f"From `{results.command}` on {where}, torch {facts['torch']}, {commit_text(facts)}.\n"


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def extra(row: Row) -> str:
    """MB beyond inputs and gradients; nothing where something else was freed while the call was
    measured, which shows as less than nothing."""
    value = row.get("extra_mb")
    return "" if value is None or value < 0 else number(value)


def shape(row: Row) -> str:
    """Tokens, vocabulary and width of a row, with the model's name."""
    name = "" if row["test_data"] in ("small", "quick") else f" ({row['test_data']})"
    return f"{row['n']} × {row['v']:,} × {row['d']}{name}"


def _plain(results: Results) -> list[Row]:
    """Rows without options, of one kind of data: the first that the run has."""
    rows = [r for r in results.sections["speed"] if not r["softcap"] and not r["rank"]]
    return [r for r in rows if r["data"] == rows[0]["data"]]


def steps(results: Results) -> str:
    """Memory and time of forward and backward, stored logits beside ours, for the first number of
    tokens of each shape."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    tokens: dict[str, int] = {}
    for row in _plain(results):
        if row["kind"] == "loss-fw-bw" and row["n"] == tokens.setdefault(
            row["test_data"], row["n"]
        ):
            found.setdefault((shape(row), row["dtype"]), {})[row["method"]] = row
    rows = []
    for (size, dtype), methods in found.items():
        if "eager" not in methods or "cce" not in methods:
            continue
        pair = [methods[name] for name in ("eager", "cce")]
        cells = [extra(r) for r in pair] + [number(r.get("runtime_ms")) for r in pair]
        rows.append([size, dtype, *cells])
    header = ["tokens × vocabulary × width", "dtype", "stored logits, MB", "cce_ext, MB"]
    return markdown([*header, "stored logits, ms", "cce_ext, ms"], rows) + "\n" + source(results)


def _name(row: Row) -> str:
    parts = [row["test_data"], f"N = {row['n']}"]
    parts += [row["dtype"]] if row["dtype"] != "bfloat16" else []
    parts += [f"softcap {row['softcap']:g}"] if row["softcap"] else []
    parts += [f"LoRA {row['rank']}"] if row["rank"] else []
    parts += ["random data"] if row["data"] == "random" else []
    return ", ".join(parts)


def _by_method(
    results: Results, cell: Callable[[Row], str], kinds: tuple[str, ...], matmul: bool
) -> str:
    """One line for each configuration and kind, one column for each method."""
    rows = results.sections["speed"]
    methods = list(
        dict.fromkeys(r["method"] for r in rows if r["method"] not in ("inputs", "matmul"))
    )
    lines: dict[tuple[str, str], dict[str, str]] = {}
    units: dict[str, str] = {}
    for row in rows:
        if row["method"] == "matmul":
            units[_name(row)] = number(row.get("runtime_ms"))
        elif row["kind"] in kinds:
            text = cell(row) or ("failed" if "error" in row else "")
            lines.setdefault((_name(row), row["kind"]), {})[row["method"]] = text
    table = [
        [name, *([units.get(name, "")] if matmul else []), _KINDS[kind]]
        + [cells.get(m, "") for m in methods]
        for (name, kind), cells in lines.items()
    ]
    header = ["data", *(["matmul, ms"] if matmul else []), "what", *methods]
    return markdown(header, table) + "\n" + source(results)


def speed(results: Results) -> str:
    """Milliseconds and ratio to the matmul."""

    def cell(row: Row) -> str:
        if row.get("x_matmul") is None:
            return ""
        return f"{number(row['runtime_ms'])} ({row['x_matmul']:.2f})"

    return _by_method(results, cell, tuple(_KINDS), matmul=True)


def memory(results: Results) -> str:
    """MB beyond inputs and gradients."""

    return _by_method(results, extra, ("loss-fw", "loss-fw-bw"), matmul=False)


def _case(row: Row) -> str:
    return f"{row['case']}, N = {row['n']}"


def _errors(row: Row) -> str:
    return "failed" if "error" in row else f"{row['de_error']:.1e} / {row['dc_error']:.1e}"


def accuracy(results: Results) -> str:
    """Errors of dE and dC by case and method."""
    rows = [row for row in results.sections["accuracy"] if not threshold(row)]
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != ROUNDED]
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(_case(row), {})[row["method"]] = _errors(row)
    table = [[c, *(cells.get(m, "") for m in (ROUNDED, *methods))] for c, cells in found.items()]
    return markdown(["case: dE / dC", ROUNDED, *methods], table) + "\n" + source(results)


def thresholds(results: Results) -> str:
    """Errors of dE and dC by case and threshold, eager beside them."""
    rows = results.sections["accuracy"]
    exponents = sorted({threshold(row) for row in rows} - {0})
    found: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        if threshold(row):
            by = ALGORITHM if row["method"].startswith(ALGORITHM) else "cce"
            found.setdefault((_case(row), by), {})[threshold(row)] = _errors(row)
    eager = {_case(row): _errors(row) for row in rows if row["method"] == "eager"}
    table = [
        [case, by, *(cells.get(k, "") for k in exponents), eager.get(case, "")]
        for (case, by), cells in found.items()
    ]
    header = ["case: dE / dC", "by", *(f"2^-{k}" for k in exponents), "eager"]
    return markdown(header, table) + "\n" + source(results)


def gradients(path: Path) -> str:
    """Errors of dE and dC on a trained head and its variants, of a run of bench.sparse_gradients."""
    run = json.loads(path.read_text(encoding="utf-8"))
    most = max(row["n"] for row in run["accuracy"])
    found: dict[str, dict[str, str]] = {}
    for row in run["accuracy"]:
        if row["n"] == most:
            cell = f"{row['dE']:.1e} / {row['dC']:.1e}"
            if row.get("exact rows"):
                cell += " (exact)" if row["exact rows"] == most else " (partly exact)"
            found.setdefault(row["head"], {})[row["method"]] = cell
    methods = list(dict.fromkeys(row["method"] for row in run["accuracy"]))
    table = [[head, *(cells.get(m, "") for m in methods)] for head, cells in found.items()]
    where = f"From `python -m bench.sparse_gradients` on {run['device']}, torch {run['torch']}.\n"
    return markdown([f"N = {most}: dE / dC", *methods], table) + "\n" + where


# Of files that are no `Results`.
FROM_FILES: dict[str, Callable[[Path], str]] = {"gradients": gradients}
TABLES: dict[str, Callable[[Results], str]] = {
    "steps": steps,
    "speed": speed,
    "memory": memory,
    "accuracy": accuracy,
    "thresholds": thresholds,
}


def rewrite(text: str, root: Path = ROOT) -> str:
    """A document with its tables made anew.

    Raises:
        ValueError: a table of an unknown kind.
    """

    def make(match: re.Match[str]) -> str:
        opening, kind, file, old, closing = match.groups()
        if kind not in (TABLES | FROM_FILES):
            raise ValueError(f"no table {kind!r}; there are {', '.join(TABLES | FROM_FILES)}")
        path = root / file
        if not path.exists():
            new = old
        elif kind in FROM_FILES:
            new = FROM_FILES[kind](path)
        else:
            new = TABLES[kind](load(path))
        return opening + new + closing

    return _BLOCK.sub(make, text)


def documents() -> list[Path]:
    """The documents that may have tables."""
    return [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]


def main() -> None:
    """Rewrite, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = 0
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = rewrite(old)
        if new != old:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'differs' if args.check else 'rewritten'}")
            if not args.check:
                path.write_text(new, encoding="utf-8")
    sys.exit(args.check and stale > 0)


if __name__ == "__main__":
    main()
