"""Samples into packs under two budgets, tokens and tiles. Called by the planner for every window, and by the held-out
loss.

Suffixes: S samples (indexed by sample number), W samples of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LARGE = 0.25
"""Part of a budget from which on a sample is hard to place."""
Pack = tuple[int, ...]
"""Sample numbers of one packed sequence."""


@dataclass(kw_only=True, slots=True)
class _Open:
    """Open packs by their room: for every number of free tiles a bit set of free token counts, and who has them."""

    bits: dict[int, int] = field(default_factory=dict)
    packs: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def put(self, pack: int, tokens: int, tiles: int) -> None:
        """A pack with so much room."""
        if tokens:
            self.bits[tiles] = self.bits.get(tiles, 0) | (1 << tokens)
            self.packs.setdefault((tokens, tiles), []).append(pack)

    def take(self, tokens: int, tiles: int) -> tuple[int, int, int] | None:
        """The pack with the least room that suffices, and its room; tokens first, then tiles."""
        best: tuple[int, int] | None = None
        for free_tiles, bits in self.bits.items():
            fits = bits >> tokens if free_tiles >= tiles else 0
            if fits:
                room = tokens + (fits & -fits).bit_length() - 1, free_tiles
                best = room if best is None or room < best else best
        if best is None:
            return None
        waiting = self.packs[best]
        pack = waiting.pop()
        if not waiting:
            self.bits[best[1]] ^= 1 << best[0]
            del self.packs[best]
        return pack, *best


def pack_best_fit(tokens_W: np.ndarray, tiles_W: np.ndarray, pack_tokens: int, pack_tiles: int) -> list[list[int]]:
    """Best fit: large samples first, then the small ones as they come, each into the fullest pack with room.

    Returns places 0..W-1. Small ones aren't sorted: packs of one length are packs of one source, which makes a step's
    loss and gradient those of that source alone. A sample beyond a budget gets a pack of its own; the index and
    `build_planner` see to it that there is none.
    """
    size_W = np.maximum(tokens_W / pack_tokens, tiles_W / pack_tiles)
    is_large_W = size_W >= LARGE
    order_W = np.lexsort((np.where(is_large_W, -tokens_W, 0), np.where(is_large_W, -size_W, 0)))
    room, packs = _Open(), list[list[int]]()
    for place, tokens, tiles in zip(
        order_W.tolist(), tokens_W[order_W].tolist(), tiles_W[order_W].tolist(), strict=True
    ):
        found = room.take(tokens, tiles)
        if found is None:
            found = len(packs), pack_tokens, pack_tiles
            packs.append([])
        pack, free_tokens, free_tiles = found
        packs[pack].append(place)
        room.put(pack, max(0, free_tokens - tokens), max(0, free_tiles - tiles))
    return packs


def deal(packs: Sequence[Pack], costs: Sequence[float], world_size: int) -> list[list[Pack]]:
    """Packs to [microstep][rank]: the ranks of a microstep work for equally long, and in sum over the step too.

    Missing ones are empty packs: every rank takes part in every microstep, else collectives hang.
    """
    order = sorted(range(len(packs)), key=lambda i: (-costs[i], packs[i]))
    dealt = [packs[i] for i in order] + [()] * (-len(packs) % world_size)
    rows = [dealt[i : i + world_size] for i in range(0, len(dealt), world_size)]
    return [row if number % 2 == 0 else row[::-1] for number, row in enumerate(rows)]
