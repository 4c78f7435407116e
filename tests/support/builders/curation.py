"""Builders for tests of curation: raw data, a stage, and the hashes of its shards."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from sailvl_trainer.contract import CurateConfig, ModelConfig, SourceConfig, Stage
from sailvl_trainer.data.synthetic import draw_caption


def write_raw_folder(folder: Path, number: int = 40) -> Path:
    """Write an image folder of synthetic images with captions, with images that are dropped for various reasons."""
    folder.mkdir(parents=True)
    for index in range(number):
        sample = draw_caption(0, index, 3)
        assert sample.image is not None
        (folder / f"{index:03d}.png").write_bytes(sample.image)
        (folder / f"{index:03d}.txt").write_text(str(sample.meta["caption"]))
    first = (folder / "000.png").read_bytes()
    blurred = io.BytesIO()
    Image.open(io.BytesIO(first)).convert("RGB").save(blurred, "JPEG", quality=92)
    bad = {"copy.png": first, "near.jpg": blurred.getvalue(), "cut.png": first[:200], "text.jpg": b"words"}
    for name, data in bad.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a caption")
    (folder / "silent.png").write_bytes(first)
    return folder


def build_tar(path: Path, files: dict[str, bytes]) -> Path:
    """Write a tar of the given files and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def build_stage(root: Path, *, name: str = "curate", **changes: Any) -> Stage:
    """Build a stage of the folder `raw` below `root` and of a procedural source; `changes` are settings of curation."""
    sources = (
        SourceConfig(path=str(root / "raw"), format="imagefolder"),
        SourceConfig(path="", format="procedural", name="drawn", samples=20, level=2),
    )
    config = CurateConfig(sources=sources, perceptual_distance=2, held_out_fraction=0.2, shard_samples=16, max_tiles=4)
    return Stage(
        namespace="team",
        run="demo",
        stage=name,
        kind="curate",
        attempt=1,
        digest=name,
        storage=str(root),
        output=str(root / "demo" / name),
        seed=3,
        model=ModelConfig(preset="tiny"),
        curate=replace(config, **changes),
    )


def hash_shards(stage: Stage) -> dict[str, str]:
    """Return the SHA-256 of every file that training reads, by path."""
    output = Path(stage.output)
    files = [p for split in ("shards", "held-out") for p in (output / split).rglob("*")]
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}
