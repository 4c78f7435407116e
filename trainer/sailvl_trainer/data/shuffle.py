"""A pseudorandom permutation of 0..n-1 whose elements are computed one by one, without memory: the order of blocks.

A Feistel network over the next even power of two, repeated until the result is below n (cycle walking; Black and
Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def permute(indices: np.ndarray, n: int, key: Sequence[int]) -> np.ndarray:
    """Return the elements at the given indices of the permutation of 0..n-1 with this key, as int64."""
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    round_keys = np.random.default_rng(key).integers(0, 2**63, ROUNDS, dtype=np.uint64)
    found = _network(indices.astype(np.uint64), half, round_keys)
    while (outside := found >= n).any():
        found[outside] = _network(found[outside], half, round_keys)
    return found.astype(np.int64)


def _network(values: np.ndarray, half: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_key in round_keys:
        mixed = (right + round_key) * _ODD  # arrays of uint64 wrap around
        mixed = (mixed ^ (mixed >> np.uint64(31))) * _MIX
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(29))) & mask)
    return (left << half) | right
