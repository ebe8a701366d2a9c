"""What changed between two runs, beyond their spread: ``python -m bench.compare OLD.json NEW.json``.

Times are compared as ratios to the matmul of their own run, so that a faster or slower machine of the
same kind does not count; memory and errors as they are. Exits with 1 if anything got worse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.results import Results, headline, load

Row = dict[str, Any]
# What makes rows of two runs the same measurement, in every section.
_KEY = ("method", "kind", "test_data", "case", "n", "v", "d", "dtype", "data", "softcap", "rank")
# Below these a change is noise even where the spread of a few calls happened to be small.
_TIME_FLOOR = 0.02
_MEMORY_FLOOR, _MEMORY_FLOOR_MB = 0.01, 1.0
# Errors are deterministic on one kind of machine; rounding differs between kinds.
_ERROR_FLOOR, _ERROR_FLOOR_ABSOLUTE = 0.1, 1e-5


class Change(NamedTuple):
    """One number that differs. ``allowed``: the difference that the spread explains."""

    name: str
    quantity: str
    old: float | str
    new: float | str
    allowed: float
    worse: bool


def key(row: Row) -> tuple:
    """Identity of a row within its section."""
    return tuple(row.get(name) for name in _KEY)


def name_of(section: str, row: Row) -> str:
    """A row for people."""
    what = row.get("case") or f"{row['test_data']} {row.get('data', '')}"
    options = [f"softcap {row['softcap']:g}"] if row.get("softcap") else []
    options += [f"LoRA {row['rank']}"] if row.get("rank") else []
    parts = [section, what, str(row["n"]), row["dtype"], *options, row["method"]]
    return " ".join(p for p in (*parts, row.get("kind", "")) if p)


def _quantities(old: Row, new: Row) -> Iterator[tuple[str, float]]:
    """Names of the numbers that both rows have, and the difference to be allowed."""
    if old.get("x_matmul") and new.get("x_matmul"):
        spread = max(old["spread"], new["spread"], _TIME_FLOOR)
        yield "x_matmul", spread * old["x_matmul"]
    if old.get("extra_mb") is not None and new.get("extra_mb") is not None:
        yield "extra_mb", _MEMORY_FLOOR_MB + _MEMORY_FLOOR * abs(old["extra_mb"])
    for quantity in ("loss_error", "de_error", "dc_error"):
        if old.get(quantity) is not None and new.get(quantity) is not None:
            yield quantity, _ERROR_FLOOR_ABSOLUTE + _ERROR_FLOOR * old[quantity]


def changes(old: Results, new: Results) -> list[Change]:
    """All numbers that differ by more than the spread, rows that began or ceased to fail, and
    rows that are gone."""
    found = []
    for section, rows in old.sections.items():
        if section == "roof":
            continue
        fresh = {key(row): row for row in new.sections.get(section, [])}
        for row in rows:
            name, other = name_of(section, row), fresh.get(key(row))
            if other is None:
                found.append(Change(name, "row", "there", "gone", 0, worse=False))
                continue
            before, after = row.get("error", "ran"), other.get("error", "ran")
            if (before == "ran") != (after == "ran"):
                found.append(Change(name, "error", before, after, 0, worse=before == "ran"))
                continue
            for quantity, allowed in _quantities(row, other):
                difference = other[quantity] - row[quantity]
                if abs(difference) > allowed:
                    values = (row[quantity], other[quantity], allowed)
                    found.append(Change(name, quantity, *values, worse=difference > 0))
    return found


def main() -> None:
    """Print the changes, the worse ones first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    old, new = load(args.old), load(args.new)
    for title, results in (("old", old), ("new", new)):
        print(f"{title}: {headline(results)}")
    if old.machine["name"] != new.machine["name"]:
        print("the machines are of different kinds: only errors and memory compare well")
    found = sorted(changes(old, new), key=lambda change: not change.worse)
    for change in found:
        mark = "worse " if change.worse else "better" if change.quantity != "row" else "      "
        values = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in (change.old, change.new)]
        print(f"{mark} {change.name}: {change.quantity} {values[0]} -> {values[1]}")
    worse = sum(change.worse for change in found)
    print(f"{worse} worse, {len(found) - worse} others changed beyond the spread")
    sys.exit(worse > 0)


if __name__ == "__main__":
    main()
