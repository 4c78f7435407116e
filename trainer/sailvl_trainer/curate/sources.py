"""Raw data sets as partitions and items, listed in a fixed order without decoding an image.

Called by pipeline.py: the partitions are listed once, and the items of each partition by the rank that claims it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from sailvl_trainer.contract import SourceConfig
from sailvl_trainer.curate.image_folder import list_image_folder
from sailvl_trainer.curate.items import Item, SourcePartition
from sailvl_trainer.curate.webdataset import list_tar
from sailvl_trainer.errors import ConfigError


def name_sources(sources: tuple[SourceConfig, ...]) -> list[SourceConfig]:
    """Return the sources with unique names: the given name, else the last part of the path; duplicates get a number."""
    named: list[SourceConfig] = []
    for source in sources:
        base = source.name or Path(source.path).name or source.format
        used_names = {other.name for other in named}
        candidates = (base if n == 1 else f"{base}-{n}" for n in range(1, len(sources) + 2))
        named.append(replace(source, name=next(name for name in candidates if name not in used_names)))
    return named


def list_partitions(sources: tuple[SourceConfig, ...], seed: int) -> list[SourcePartition]:
    """Return the partitions of all sources in a fixed order. Raises ConfigError if a source doesn't exist."""
    return [partition for source in name_sources(sources) for partition in _partition_source(source, seed)]


def _partition_source(source: SourceConfig, seed: int) -> Iterator[SourcePartition]:
    base = SourcePartition(source=source.name, format=source.format, path=source.path, samples=source.samples)
    if source.format == "procedural":
        yield replace(base, path="", seed=seed, level=source.level)
        return
    root = Path(source.path)
    if not root.exists():
        raise ConfigError(f"source {source.name}: {root} does not exist; put the data there or change the path")
    if source.format == "imagefolder":
        yield base
        return
    tars = [root] if root.is_file() else sorted(root.rglob("*.tar"))
    if not tars:
        raise ConfigError(
            f"source {source.name}: {root} contains no .tar files; change the path, or set format: imagefolder"
        )
    yield from (replace(base, path=str(tar)) for tar in tars)


def list_items(partition: SourcePartition) -> Iterator[Item]:
    """Yield the items of a partition, at most its `samples`; broken entries are items with a `problem`."""
    if partition.format == "procedural":
        return (
            Item(source=partition.source, key=f"{index:09d}", index=index, seed=partition.seed, level=partition.level)
            for index in range(partition.samples)
        )
    lister = list_image_folder if partition.format == "imagefolder" else list_tar
    return islice(lister(Path(partition.path), partition.source), partition.samples or None)
