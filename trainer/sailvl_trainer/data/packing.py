"""Packing: samples into packs under two budgets, tokens and tiles; and the assignment of packs to ranks.

Called by the planner for every window, and by the loader for the validation loss.
Suffixes: W samples of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LARGE = 0.25
"""Fraction of a budget from which on a sample counts as large and is placed first."""
Pack = tuple[int, ...]
"""Numbers of the samples in one packed sequence."""


@dataclass(kw_only=True, slots=True)
class _OpenPacks:
    """Packs with free space, searchable by it: per number of free tiles, a bit set of the free token counts."""

    bits: dict[int, int] = field(default_factory=dict)
    """Bit t of bits[n] is set if a pack has n free tiles and t free tokens."""
    packs: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """The packs by (free tokens, free tiles)."""

    def put(self, pack: int, tokens: int, tiles: int) -> None:
        """Add a pack with this much free space."""
        if tokens:
            self.bits[tiles] = self.bits.get(tiles, 0) | (1 << tokens)
            self.packs.setdefault((tokens, tiles), []).append(pack)

    def take(self, tokens: int, tiles: int) -> tuple[int, int, int] | None:
        """Remove and return the fullest pack that still fits the sample, with its free tokens and tiles."""
        best: tuple[int, int] | None = None
        for free_tiles, bits in self.bits.items():
            fits = bits >> tokens if free_tiles >= tiles else 0
            if fits:
                free = tokens + (fits & -fits).bit_length() - 1, free_tiles
                best = free if best is None or free < best else best
        if best is None:
            return None
        candidates = self.packs[best]
        pack = candidates.pop()
        if not candidates:
            self.bits[best[1]] ^= 1 << best[0]
            del self.packs[best]
        return pack, *best


def pack_best_fit(tokens_W: np.ndarray, tiles_W: np.ndarray, pack_tokens: int, pack_tiles: int) -> list[list[int]]:
    """Pack samples by best fit; return the packs as lists of indices 0..W-1.

    1. Place the large samples, largest first, each into the fullest pack with room, else into a new one.
    2. Place the small samples likewise, in the order given.

    Small samples are not sorted: samples of one length come from one source, so sorted packs would make a step's loss
    and gradient those of a single source. The price is 0.3 % of the capacity where all samples are text (ADR 9). A
    sample that exceeds a budget gets a pack of its own; the dataset and `build_planner` make sure that there is none.
    """
    size_W = np.maximum(tokens_W / pack_tokens, tiles_W / pack_tiles)
    is_large_W = size_W >= LARGE
    order_W = np.lexsort((np.where(is_large_W, -tokens_W, 0), np.where(is_large_W, -size_W, 0)))
    open_packs, packs = _OpenPacks(), list[list[int]]()
    for sample, tokens, tiles in zip(
        order_W.tolist(), tokens_W[order_W].tolist(), tiles_W[order_W].tolist(), strict=True
    ):
        found = open_packs.take(tokens, tiles)
        if found is None:
            found = len(packs), pack_tokens, pack_tiles
            packs.append([])
        pack, free_tokens, free_tiles = found
        packs[pack].append(sample)
        open_packs.put(pack, max(0, free_tokens - tokens), max(0, free_tiles - tiles))
    return packs


def assign_to_ranks(packs: Sequence[Pack], costs: Sequence[float], world_size: int) -> list[list[Pack]]:
    """Assign a step's packs to [microbatch][rank], so that all ranks work equally long.

    Packs are sorted by cost and assigned back and forth over the ranks: equal work per microbatch, and in the sum of
    the step. The last microbatch is filled up with empty packs, since a rank that skips a collective would block the
    others.
    """
    order = sorted(range(len(packs)), key=lambda i: (-costs[i], packs[i]))
    padded = [packs[i] for i in order] + [()] * (-len(packs) % world_size)
    rows = [padded[i : i + world_size] for i in range(0, len(padded), world_size)]
    return [row if number % 2 == 0 else row[::-1] for number, row in enumerate(rows)]
