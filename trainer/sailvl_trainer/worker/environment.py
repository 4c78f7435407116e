"""A worker's home: a numeric user may have neither name nor home, and the root file system is read-only."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_WRITABLE = "/tmp"  # the pod's own, lost with it


def prepare_home(environment: MutableMapping[str, str]) -> None:
    """Fill in what libraries ask for: a home that can be written to, a user's name, no progress bars in logs. What is
    set stays."""
    if not os.access(environment.get("HOME") or "/", os.W_OK):
        environment["HOME"] = _WRITABLE
    environment.setdefault("USER", "sailvl")
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
