"""What the benchmarks write: rows in named sections of one JSON file, with the machine and the
command that made them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.methods import versions
from cce_ext import build_info, diagnostics

ROOT = Path(__file__).resolve().parent.parent
#: Not committed; results that the documents show are copied to docs/results.
CACHE = ROOT / "bench" / "results"


def _git(*arguments: str) -> str:
    """What git says about this checkout, "" where there is no git or no history."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commits() -> dict[str, str]:
    """What was measured, "-dirty" where files differed from it.

    Keys: commit; commit_of, where it is from: "library", which knows what it was built from (a
    checkout may have another history, or none), else "checkout", else "unknown"; and checkout,
    where the library's commit is known to it but another one is checked out: the Python files are
    of that one.
    """
    here = _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    built = build_info().get("git_commit")
    if not built:
        return {"commit": here or "unknown", "commit_of": "checkout" if here else "unknown"}
    found = {"commit": built, "commit_of": "library"}
    if here not in ("", built) and _git("cat-file", "-t", built.removesuffix("-dirty")) == "commit":
        found["checkout"] = here
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    facts: dict[str, Any] = {
        "device": device.type,
        "name": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **commits(),
        "packages": versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "backend": os.environ.get("CCE_BACKEND", "chosen by capability"),
        }
    else:
        facts |= {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    return facts


def _arguments() -> list[str]:
    """This process's arguments, without where it writes."""
    kept, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and not argument.startswith(("--out=", "--json=")):
            kept += [] if argument in ("--out", "--json") else [argument]
        skip = argument in ("--out", "--json")
    return kept


@dataclass
class Results:
    """One run. Every section is a list of rows, which are plain dictionaries."""

    machine: dict[str, Any]
    command: str
    sections: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def start(cls, device: torch.device, module: str) -> Results:
        """An empty run of ``python -m module`` with this process's arguments."""
        return cls(machine(device), f"python -m {module} {shlex.join(_arguments())}".rstrip())

    def add(self, section: str, rows: list[dict[str, Any]]) -> None:
        """Appends rows to a section."""
        self.sections.setdefault(section, []).extend(rows)

    def save(self, path: Path | None) -> None:
        """Writes everything so far; an interrupted run leaves the older file or the newer one."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"machine": self.machine, "command": self.command, **self.sections}, indent=1
        )
        part = path.with_suffix(".part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)


def commit_text(facts: dict[str, Any]) -> str:
    """The commit of a run's `machine`, in words; of older runs it is not known whose it is."""
    text = f"commit {facts['commit']}"
    return text + (f" (Python files: {facts['checkout']})" if "checkout" in facts else "")


def headline(results: Results) -> str:
    """The machine in one line."""
    facts = results.machine
    parts = [facts["name"], f"torch {facts['torch']}", commit_text(facts)]
    if "capability" in facts:
        parts.append(f"{facts['capability']}, {facts['threads']} threads")
    parts += [f"{name} {version}" for name, version in facts["packages"].items()]
    return ", ".join(parts)


def load(path: Path) -> Results:
    """Reads what `Results.save` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Results(data.pop("machine"), data.pop("command"), data)


def error_text(error: BaseException) -> str:
    """An error in one line for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def path_taken() -> dict[str, Any]:
    """Which way the last call of this package went, for methods of this package."""
    facts = diagnostics()
    keys = ("path", "reason", "exact", "exact_rows", "kept", "candidates", "dropped_share")
    return {key: facts[key] for key in keys if facts.get(key) not in (None, "")}
