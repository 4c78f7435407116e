"""Builders for tests of workers and their ranks."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from sailvl_trainer.contract import CurateConfig, ModelConfig, SourceConfig, Stage


def build_stage(root: Path, *, run: str = "demo", attempt: int = 1, start_timeout_seconds: int = 0) -> Stage:
    """Return a valid stage config, whose sources are never read."""
    return Stage(
        namespace="team",
        run=run,
        stage="curate",
        kind="curate",
        attempt=attempt,
        start_timeout_seconds=start_timeout_seconds,
        digest="d" * 64,
        storage=str(root),
        output=str(root / run / "curate"),
        model=ModelConfig(preset="tiny"),
        curate=CurateConfig(sources=(SourceConfig(path="/data/raw", format="imagefolder"),)),
    )


def free_port() -> int:
    """Return a free port whose next port is free too, for a second worker on this machine."""
    while True:
        with socket.socket() as probe, socket.socket() as other:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
            with suppress(OSError, OverflowError):
                other.bind(("", port + 1))
                return port
