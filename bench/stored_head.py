"""A trained head that was not made here, for tests and benchmarks of gradients: where it lies, and its files.

The folder holds ``head_c0.npy``, ``head_c1.npy``, ... (rows of the classifier, to be joined) and
``head_e.npy`` as bfloat16 bit patterns in int16, and ``head_t.npy``, the targets, as int32.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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


def load_folder(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """e (N, D) and c (V, D), bfloat16, and targets (N,) int64."""
    count = len(list(folder.glob("head_c*.npy")))
    parts = [torch.from_numpy(np.load(folder / f"head_c{i}.npy")) for i in range(count)]
    e = torch.from_numpy(np.load(folder / "head_e.npy"))
    targets = torch.from_numpy(np.load(folder / "head_t.npy")).long()
    return e.view(torch.bfloat16), torch.cat(parts).view(torch.bfloat16), targets
