"""Which stretches of the vocabulary the exact backward takes at a time, and where their G lies.

Every stretch reads and writes all of the fp32 dE, and starts matmuls of its own: so few of them, as large as
memory allows. Most of that memory is there anyway: the rows of dC that later stretches will fill hold G of
the earlier ones. In a workspace of their own are the last stretches, and all of them where the classifier
gets no gradient; so its freezing changes the order in which dE is added up, and dE's last bits.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of workspace, fp32 sums included; CCE_BACKWARD_WORKSPACE_MB (in MB of 10⁶ bytes) overrides
# it.
DEFAULT_WORKSPACE_MB = 284
# A chunk never gets less than this, however large the sums are.
_MIN_CHUNK_BYTES = 100_000_000
# Rows of the kernels' tiles.
_TILE_ROWS = 128
# What matmuls of many columns cut their results into, one way or the other.
_MATMUL_TILE = (128, 256)
# Multiply-adds that a multiprocessor of an H200 does while memory moves a byte; of an A100 and an H100 about the same.
_MULTIPLIES_PER_BYTE = 0.66
# Of more tiles the waves are many, and how full the last one is does not matter.
_MANY_TILES = 256
# An odd number of tiles below this takes Hopper's kernels as long as the next even one: most of their blocks take
# two tiles of a row block at a time, and the others (csrc/cuda/sm90/groups.cuh) are too few for those left over.
_FEW_TILES = 11


class Chunk(NamedTuple):
    """Ids first to last (exclusive); whether their G lies in the rows of dC from last on."""

    first: int
    last: int
    in_dc: bool


class Work(NamedTuple):
    """What the choice depends on: E (n, d); bytes of the fp32 sums, which every chunk reads and writes, and of a row of
    dC (0 where there is none); columns of a kernel's tile; multiprocessors."""

    n: int
    d: int
    sums: int
    dc_row: int
    tile: int
    blocks: int

    def waves(self, rows: int, columns: int) -> int:
        """Of tiles."""
        return -(-rows * columns // self.blocks)

    def cost(self, columns: int) -> float:
        """Of a chunk, in multiply-adds of a multiprocessor: the recompute, the product by columns, the
        sums. (The product by rows has the same tiles whatever the chunk.)"""
        tiles = -(-columns // self.tile)
        tiles += tiles % 2 if tiles < _FEW_TILES else 0
        recompute = self.waves(-(-self.n // _TILE_ROWS), tiles)
        rows, width = _MATMUL_TILE
        product = min(
            self.waves(-(-columns // rows), -(-self.d // width)),
            self.waves(-(-columns // width), -(-self.d // rows)),
        )
        return (
            recompute * _TILE_ROWS * self.tile * self.d
            + product * rows * width * self.n
            + 2 * self.sums * _MULTIPLIES_PER_BYTE
        )

    def cost_of_equal(self, columns: int, tiles: int) -> float:
        """Of columns in chunks of so many tiles."""
        whole, rest = divmod(columns, tiles * self.tile)
        return whole * self.cost(tiles * self.tile) + (self.cost(rest) if rest else 0.0)

    def tiles_in_dc(self, columns: int) -> int:
        """Tiles of the next chunk whose G (16 bits) fits into the rows of dC after it; columns are left."""
        return columns * self.dc_row // ((2 * self.n + self.dc_row) * self.tile)


def workspace_bytes() -> int:
    """Bytes that a backward may take beyond its gradients."""
    return int(float(os.environ.get("CCE_BACKWARD_WORKSPACE_MB", DEFAULT_WORKSPACE_MB)) * 1e6)


def chunks(e: Tensor, v: int, sums: int, dc: Tensor | None, copied: int) -> tuple[Chunk, ...]:
    """The chunks of v ids, in their order.

    Shapes: e (N, D), 16-bit, dc (V, D) like it or None. Bytes: ``sums`` of the fp32 sums, ``copied``
    of what is copied of each id, for which chunks in dc are to need no more than others for G.
    Chunks that do not lie in dc share one piece of memory, as large as the first of them needs.
    """
    n, d = e.shape
    dc_row = 0 if dc is None else 2 * d
    blocks = torch.cuda.get_device_properties(e.device).multi_processor_count
    work = Work(n, d, sums, dc_row, torch.ops.cce.column_tile(e), blocks)
    budget = max(workspace_bytes() - sums, min(_MIN_CHUNK_BYTES, workspace_bytes()))
    most_in_dc = v if copied == 0 else budget // (copied * work.tile)
    return plan(work, v, max(1, budget // (2 * n * work.tile)), most_in_dc)


@functools.lru_cache(maxsize=256)
def plan(work: Work, v: int, most: int, most_in_dc: int) -> tuple[Chunk, ...]:
    """See `chunks`; most: tiles of a chunk in the workspace, most_in_dc: in dC, if they fit."""
    found: list[Chunk] = []
    left = v
    while most * work.tile < left and (fits := min(work.tiles_in_dc(left), most_in_dc)) > most:
        # All but an eighth of what fits, if that makes fuller waves.
        fewest = fits if fits > _MANY_TILES else max(most, fits - fits // 8)
        columns = work.tile * min(
            range(fits, fewest - 1, -1), key=lambda t: work.cost(t * work.tile) / t
        )
        found.append(Chunk(v - left, v - left + columns, True))
        left -= columns
    tiles = most
    if most * work.tile < left and most <= _MANY_TILES:
        tiles = min(range(most, most // 2, -1), key=lambda t: work.cost_of_equal(left, t))
    columns = tiles * work.tile
    own = (Chunk(first, min(first + columns, v), False) for first in range(v - left, v, columns))
    return (*found, *own)
