"""Pictures cut into tiles, as InternVL2 does (arXiv 2404.16821, §3): the grid of the closest shape, and a thumbnail.

Shapes: N tiles, H = W = image_size.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def choose_grid(width: int, height: int, max_tiles: int, image_size: int) -> tuple[int, int]:
    """Columns and rows. Closest aspect ratio wins; on a tie the larger grid if the picture fills half of it."""
    grids = sorted(
        ((c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)), key=lambda g: (g[0] * g[1], g)
    )
    ratio, area, best, best_gap = width / height, width * height, (1, 1), float("inf")
    for cols, rows in grids:
        gap = abs(ratio - cols / rows)
        is_filled = gap == best_gap and area > 0.5 * image_size**2 * cols * rows
        if gap < best_gap or is_filled:
            best, best_gap = (cols, rows), gap
    return best


def count_tiles(grid: tuple[int, int]) -> int:
    """Tiles of a grid and, when there is more than one, the thumbnail."""
    tiles = grid[0] * grid[1]
    return tiles + 1 if tiles > 1 else tiles


def cut_tiles(image: Image.Image, grid: tuple[int, int], image_size: int) -> np.ndarray:
    """(N, 3, H, W) float32, normalised with ImageNet's mean and deviation; row by row, the thumbnail last."""
    cols, rows = grid
    resized = image.resize((cols * image_size, rows * image_size), Image.Resampling.BICUBIC)
    parts = [
        resized.crop((x * image_size, y * image_size, (x + 1) * image_size, (y + 1) * image_size))
        for y in range(rows)
        for x in range(cols)
    ]
    if len(parts) > 1:
        parts.append(image.resize((image_size, image_size), Image.Resampling.BICUBIC))
    pixels_NHW3 = np.stack([np.asarray(part, dtype=np.float32) for part in parts]) / 255.0
    return np.ascontiguousarray(((pixels_NHW3 - MEAN) / STD).transpose(0, 3, 1, 2))
