"""A trained output layer from files: classifier, hidden states and targets of held-out tokens.

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
DEFAULT = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "trained_head"
HELP = (
    f"no trained head: let {VARIABLE} name a folder with head_c*.npy, head_e.npy and head_t.npy "
    "(bench/stored_head.py says what they hold), or put it at ../shared/data/trained_head"
)


def find_head() -> Path | None:
    """The folder that the environment names, else the one beside the repository, if it is there."""
    folder = Path(os.environ.get(VARIABLE, DEFAULT))
    return folder if (folder / "head_t.npy").is_file() else None


def load_head(
    folder: Path | str, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """e (N, D) and c (V, D), bfloat16, and targets (N,) int64."""
    folder = Path(folder)
    parts = [
        np.load(folder / f"head_c{i}.npy") for i in range(len(list(folder.glob("head_c*.npy"))))
    ]
    c = torch.cat([torch.from_numpy(part) for part in parts]).view(torch.bfloat16)
    e = torch.from_numpy(np.load(folder / "head_e.npy")).view(torch.bfloat16)
    targets = torch.from_numpy(np.load(folder / "head_t.npy")).long()
    return e.to(device), c.to(device), targets.to(device)
