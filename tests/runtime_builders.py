"""Builders for tests of the trainer's runtime."""

from __future__ import annotations

from pathlib import Path

from sailvl_trainer.contract import CurateConfig, ModelConfig, SourceConfig, Stage


def build_stage(root: Path, *, run: str = "demo", attempt: int = 1) -> Stage:
    """A good stage document to bend; the sources are never read."""
    return Stage(
        namespace="team",
        run=run,
        stage="curate",
        kind="curate",
        attempt=attempt,
        digest="d" * 64,
        storage=str(root),
        output=str(root / run / "curate"),
        model=ModelConfig(preset="tiny"),
        curate=CurateConfig(sources=(SourceConfig(path="/data/raw", format="imagefolder"),)),
    )
