"""A pickle that runs code where it is read, for tests that nothing unpickles what another process sends."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path


class PickleAttack:
    """An object whose pickle creates a file where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


C10D_RENDEZVOUS_KEY = "torch.rendezvous.team.demo.curate.1"
"""Key of the store in which torch's c10d rendezvous keeps its state, as a pickle in base64."""


def build_pickle_attack(marker: Path) -> bytes:
    """Return a pickle that creates the file `marker` where it is read."""
    return pickle.dumps(PickleAttack(marker))
