"""The shapes that break things, in one place: each sits at an edge of a tile, or is too small for any.

(batch, length, vocabulary, hidden) each.
"""

from __future__ import annotations

Shape = tuple[int, int, int, int]

# The CPU path: 1024 and 2048 vocabulary ids a block, one token, odd hidden sizes.
CPU_TILES: list[Shape] = [
    (1, 3, 7, 3),
    (3, 5, 129, 17),
    (2, 7, 1023, 8),
    (2, 4, 1025, 33),
    (1, 5, 2047, 12),
    (2, 3, 2049, 5),
]

# The CPU path's rows: one, more than a forward block (1024) and than a backward block (2048).
CPU_ROWS: list[Shape] = [(1, 1, 129, 8), (1, 1, 1, 4), (1, 1025, 300, 16), (3, 700, 1100, 24)]

# Every implementation, the Triton kernels above all: 64 rows, 128 vocabulary ids, 32 in K; 4096 ids a split. Small,
# since without a GPU they are interpreted.
PARITY: list[Shape] = [
    (1, 3, 7, 3),
    (1, 2, 129, 33),
    (2, 32, 128, 32),
    (1, 65, 127, 17),
    (3, 43, 257, 64),
    (1, 5, 4097, 31),
]

# The GPU kernels: 128 rows, 192, 256 or 384 columns, 64 in K; 4608 columns a split at most.
GPU_TILES: list[Shape] = [
    (1, 1, 129, 33),
    (1, 3, 7, 3),
    (2, 64, 255, 72),
    (1, 127, 256, 64),
    (3, 43, 257, 200),
    (2, 130, 4095, 17),
    (1, 300, 4097, 128),
    (1, 128, 383, 136),
    (2, 65, 384, 64),
    (1, 129, 385, 264),
    (1, 257, 4609, 192),
]

# The GPU kernels' offsets: N x V, and V x D, beyond 2^31.
GPU_HUGE: list[tuple[int, int, int]] = [(65536, 49152, 64), (256, 4_300_000, 512)]
