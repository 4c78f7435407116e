"""One format for every engine: what a rank owns of a parameter is a flat run of float32 numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

KEYS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    name: str
    """Of the parameter."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Of this run, in the flattened parameter."""
    tensors: dict[str, torch.Tensor]
    """KEYS to 1-D float32 views that may be written to."""

    @property
    def numel(self) -> int:
        return self.tensors["weight"].numel()
