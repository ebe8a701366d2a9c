"""Where a trained head lies that was not made here, for tests and benchmarks of gradients."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "CCE_TRAINED_HEAD"
#: where it lies beside the repository
BESIDE = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "trained_head"
HELP = (
    f"no trained head: let {VARIABLE} name one (a folder of .npy files or what `python -m "
    "bench.trained_head` keeps), or put the folder at ../shared/data/trained_head"
)


def find_head() -> Path | None:
    """The head that the environment names, else the one beside the repository, if it is there; for
    `bench.trained_head.load_head`."""
    path = Path(os.environ.get(VARIABLE, BESIDE))
    return path if path.exists() else None
