"""Halton's order of the cells of a grid."""

from __future__ import annotations

import math
from functools import lru_cache

import torch


def usual_grid(length: int) -> tuple[int, int]:
    """A square if the length is a square number, else a line."""
    side = math.isqrt(length)
    return (side, side) if side**2 == length else (1, length)


@lru_cache(maxsize=16)  # asked for in every step
def halton_order(height: int, width: int) -> torch.Tensor:
    """The rank (height · width,) of each grid cell, in raster order, in the Halton sequence of bases 2 (rows) and 3 (columns).

    A cell is ranked by when the sequence first hits it (arXiv 2503.17076), so any prefix of the order is spread over the grid.
    """

    def radical_inverse(index: torch.Tensor, base: int) -> torch.Tensor:
        value, scale = torch.zeros(len(index), dtype=torch.double), 1.0 / base
        while index.any():
            value = value + (index % base) * scale
            index = index // base
            scale = scale / base
        return value

    num_cells, num_points = height * width, 4 * height * width
    while True:
        index = torch.arange(1, num_points + 1)
        row = (radical_inverse(index, 2) * height).long()
        column = (radical_inverse(index, 3) * width).long()
        first = torch.full((num_cells,), num_points).scatter_reduce(0, row * width + column, index - 1, "amin")
        if (first < num_points).all():
            return first.argsort().argsort()
        num_points *= 2  # some cell was not hit yet
