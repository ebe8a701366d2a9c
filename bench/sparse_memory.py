"""What the sparse path's forward takes beyond its inputs, and its backward for the tail's tilt, from the
shapes alone: ``python -m bench.sparse_memory N V D [R]``; needs no GPU.

Every list has a fixed capacity, so the peak of each step is a sum of array sizes, whatever the data.
Counted are arrays that grow with N times something; those with a few bytes a row or a vocabulary
entry are not. A test on a GPU (`tests/test_sparse_memory.py`) compares the sum with the allocator's peak.
"""

from __future__ import annotations

import argparse

from bench.timing import MB
from cce_ext.sparse.forward import (
    BOUND_ROWS,
    FREQUENT_TARGETS,
    HOT_IDS,
    ROW_BLOCK,
    SAMPLED_COLUMNS,
    candidate_capacity,
    kept_capacity,
)
from cce_ext.sparse.tail import CLASSES, GROUP, TILT_IDS, groups, sample_size

# As in csrc/torch/cuda_call.h: partials of the splits at most, converted adapter rows of a launch.
_PARTIAL_BYTES = 12 << 20
_PACK_BYTES = 128 << 20


def forward_peaks(
    n: int, v: int, d: int, r: int, eps: float, converts: bool = True
) -> dict[str, int]:
    """Bytes at the highest point of each step of the forward, without metrics or softcap.

    n, v, d, r: as in the shapes of e (N, D), c (V, D), u (N, R); eps: the threshold; converts:
    whether lora_b is float32, not of e's dtype.
    """
    columns = SAMPLED_COLUMNS + FREQUENT_TARGETS + CLASSES
    products = 4 * min(n, BOUND_ROWS) * columns
    pool = 8 * candidate_capacity(n, v, eps) * -(-n // ROW_BLOCK)
    kept = kept_capacity(n, v, eps)
    partials = max(8 * n * groups(v), min(_PARTIAL_BYTES, 8 * n * -(-v // ROW_BLOCK)))
    copies = 2 * n * (d + r)  # of rows that count, side by side, for sm_90
    adapter = 0
    if r and converts:
        adapter = min(v, max(1, _PACK_BYTES // (2 * r * GROUP)) * GROUP) * 2 * r
    levels = v * sample_size(n, v)  # of the sampled rows' logits
    pairs = 8 * kept  # keys and logits
    ids = 4 * kept  # so are rows
    return {
        "bounds": 2 * columns * (d + 3 * r) + products,
        "pass over the vocabulary": pool + partials + levels + copies + adapter,
        "selection": pool + partials + levels + pairs,
        "sort": partials + levels + pairs + 3 * ids,
        "result": 3 * ids + 4 * n * groups(v) + 8 * HOT_IDS + 4 * CLASSES * v,
    }


def column_bytes(n: int, v: int, eps: float) -> int:
    """What sorting by column takes in the backward, before there are gradients by columns: ids and
    numbers of the entries, twice; the numbers stay."""
    return 16 * kept_capacity(n, v, eps)


def tilt_bytes(n: int) -> int:
    """What the tilt (N, J) of J ids, 16 bits each, adds to the backward's factors."""
    return 2 * TILT_IDS * n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("shape", type=int, nargs="+", help="N V D, and R of a low-rank head")
    parser.add_argument("--eps", type=float, help="threshold; by default 2^-13")
    parser.add_argument("--same-dtype", action="store_true", help="adapters of e's dtype")
    args = parser.parse_args()
    if len(args.shape) not in (3, 4):
        parser.error("the shape is N V D or N V D R")
    n, v, d, r = (*args.shape, 0)[:4]
    eps = args.eps or 2.0**-13
    for step, size in forward_peaks(n, v, d, r, eps, not args.same_dtype).items():
        print(f"{step:26} {size / MB:8.1f} MB")
    print(f"{'columns, in the backward':26} {column_bytes(n, v, eps) / MB:8.1f} MB")
    print(f"{'tilt, in the backward':26} {tilt_bytes(n) / MB:8.1f} MB")


if __name__ == "__main__":
    main()
