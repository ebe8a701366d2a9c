"""The shapes that break things: one list for the CPU tests, the GPU tests, the parity tests and
bench/.

Tiles of the compiled paths: rows 64 to 256, vocabulary 128 to 2048, K in steps of 32 and 64. Each
shape sits at an edge of one of them, or is too small for any.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """N rows (tokens), V vocabulary size, D hidden size, R low rank (0: no adapter)."""

    n: int
    v: int
    d: int
    r: int = 0


# Small enough for Triton's interpreter and for gradcheck-like comparisons.
TINY = [
    Shape(1, 7, 3),
    Shape(5, 129, 40, 1),
    Shape(33, 257, 64, 8),
    Shape(2, 1, 8),
]

# Around the tiles of every compiled path.
RAGGED = [
    Shape(1, 127, 8, 1),
    Shape(1, 129, 33),
    Shape(63, 128, 64, 8),
    Shape(65, 255, 72, 100),
    Shape(127, 2047, 17),
    Shape(129, 2049, 40, 8),
    Shape(257, 1025, 100, 256),
    Shape(300, 4097, 64, 1),
]

# What a head of a real model looks like, scaled down to what a test can afford.
REALISTIC = [
    Shape(512, 8321, 256),
    Shape(1000, 5000, 512, 16),
]
