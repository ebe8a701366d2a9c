"""Random shapes and option sets: the exact gradient against float64 eager PyTorch, and on a GPU the
sparse one against its reference.

CCE_FUZZ_CASES sets how many cases there are (40 by default), CCE_FUZZ_SEED the seed of the first; a
failure names its case.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from cce_ext import diagnostics
from cce_ext.sparse import history
from cce_ext.sparse.forward import kept_capacity
from cce_ext.sparse.tail import FLAT, GROUP
from tests.oracle import Case, compare
from tests.sparse_cuda_problem import Problem, mismatches

CASES = int(os.environ.get("CCE_FUZZ_CASES", "40"))
SEED = int(os.environ.get("CCE_FUZZ_SEED", "20260101"))
SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
CUDA_SLACK = 1e-4


def random_case(seed: int, device: str) -> Case:
    """A case from a seed. Sizes are drawn log-uniformly, with a liking for the neighbours of tile
    sizes."""
    r = random.Random(seed)

    def size(low: int, high: int, tiles: tuple[int, ...]) -> int:
        if r.random() < 0.4:
            near = r.choice([t for t in tiles if t < high] or [high]) + r.choice((-1, 0, 1))
            return min(max(low, near), high)
        return round(low * (high / low) ** r.random())

    cuda = device == "cuda"
    length = size(1, 600 if cuda else 60, (64, 128, 256))
    dtype = r.choice((torch.bfloat16, torch.float16) if cuda else tuple(SLACK))
    shift = r.choice((0, 0, 1, 2))
    return Case(
        batch=r.randint(1, 3),
        length=max(length, shift + 1),
        vocab=size(1, 20000 if cuda else 5000, (128, 256, 1024, 2048, 4096, 8192)),
        hidden=size(1, 600 if cuda else 80, (8, 16, 32, 64, 128)),
        rank=r.choice((0, 0, 1, 8, 16, 100, 256)),
        dtype=dtype,
        bias=r.random() < 0.4,
        softcap=r.choice((None, None, 2.0, 30.0)),
        shift=shift,
        reduction=r.choice(("mean", "sum", "none")),
        ignored=r.choice((0.0, 0.0, 0.1, 0.5, 0.95, 1.0)),
        smoothing=r.choice((0.0, 0.0, 0.1)),
        logit_scale=r.choice((1.0, 1.0, 0.3, 2.0, -1.0)),
        lse_weight=r.choice((0.0, 0.0, 0.1)),
        strided=r.random() < 0.3,
        adapter_dtype=r.choice((None, torch.float32)) if dtype != torch.float64 else None,
        spread=r.choice((0.1, 1.0, 1.0, 3.0)),
        seed=seed,
        device=device,
    )


@pytest.mark.parametrize("device", ["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def test_random_cases(device: str) -> None:
    print(f"fuzz: {CASES} cases from seed {SEED} on {device}")
    failures = []
    for seed in range(SEED, SEED + CASES):
        case = random_case(seed, device)
        slack = CUDA_SLACK if device == "cuda" else SLACK[case.dtype]
        failures += [f"{case}: {failure}" for failure in compare(case).failures(slack)]
    assert not failures, f"{len(failures)} of {CASES} cases:\n" + "\n".join(failures[:10])


def random_sparse_options(seed: int) -> dict[str, object]:
    """Arguments of a `Problem` from a seed: large enough a vocabulary for the sparse gradient."""
    r = random.Random(seed)
    if r.random() < 0.5:
        tile = r.choice((192, 256, GROUP))
        v = max(16385, r.randint(16385, 40000) // tile * tile + r.choice((-1, 0, 1, 8)))
    else:
        v = round(16385 * 2.5 ** r.random())
    near = r.choice((64, 128, 256, 512, 1024)) + r.choice((-1, 0, 1))
    n = near if r.random() < 0.4 else round(1500 ** r.random())
    ignored = r.choice((0.0, 0.0, 0.1, 0.5, 0.95))
    dtype = r.choice((torch.bfloat16, torch.float16))
    rank = r.choice((0, 0, 0, 1, 8, 16, 100, 256))
    options: dict[str, object] = {
        # About 16 rows that count: the gradient of one alone may cancel to anything.
        "n": max(round(16 / (1 - ignored)), n),
        "v": v,
        "d": 8 * round(80 ** r.random()),
        "dtype": dtype,
        "rank": rank,
        # As float16 is trained: means of small probabilities are below its numbers otherwise.
        "loss_scale": 1024.0 if dtype == torch.float16 else 1.0,
        "bias": r.random() < 0.4,
        "ignored": ignored,
        "lse": r.random() < 0.3,
        "logit_scale": r.choice((1.0, 1.0, 1.0, 0.9, 0.5, 1.5)),
        "eps": 2.0 ** -r.choice((10, 12, 13, 13, 13, 14, 16)),
        "seed": seed,
    }
    either = r.random()
    if either < 0.25:
        options["softcap"] = r.choice((15.0, 30.0, 50.0))
    elif either < 0.4:
        options["label_smoothing"] = r.choice((0.05, 0.1))
    return options


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_sparse_cases() -> None:
    print(f"fuzz: {CASES} sparse cases from seed {SEED}")
    failures, sparse = [], 0
    for seed in range(SEED, SEED + CASES):
        history.clear()  # of flat calls, which make later ones exact
        problem = Problem(**(options := random_sparse_options(seed)))
        expected = problem.reference()
        if abs(expected.dropped_share.item() - FLAT) < 2e-3:
            continue  # rounding decides whether the call counts as flat
        found = [f"{options}: {m}" for m in mismatches(problem, expected, 8e-3)]
        room = kept_capacity(len(problem.targets), len(problem.leaves["c"]), problem.eps)
        if diagnostics()["overflowed_blocks"] or diagnostics()["kept"] > room:
            continue  # exact rows by the lists' capacities, of which the reference knows nothing
        sparse += not expected.exact_rows.any()
        failures += found
    print(f"fuzz: {sparse} without an exact row")
    assert sparse > CASES // 4
    assert not failures, f"{len(failures)} of {CASES} cases:\n" + "\n".join(failures[:10])
