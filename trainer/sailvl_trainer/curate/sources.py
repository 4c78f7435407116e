"""Raw data sets as partitions and items, listed in a fixed order without decoding an image.

A partition is an image folder (image_folder.py), a tar (webdataset.py) or a synthetic set. Called by stage.py: the
partitions are listed once, and the items of each partition by the rank that claims it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from sailvl_trainer.contract import SourceConfig
from sailvl_trainer.curate.image_folder import list_image_folder, walk_folder
from sailvl_trainer.curate.items import Item, SourcePartition, ignore_progress
from sailvl_trainer.curate.webdataset import list_tar
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.storage.data_files import DataRoots


def name_sources(sources: tuple[SourceConfig, ...]) -> list[SourceConfig]:
    """Return the sources with unique names: the given name, else the last part of the path; duplicates get a number."""
    named: list[SourceConfig] = []
    for source in sources:
        base = source.name or Path(source.path).name or source.format
        used_names = {other.name for other in named}
        candidates = (base if n == 1 else f"{base}-{n}" for n in range(1, len(sources) + 2))
        named.append(replace(source, name=next(name for name in candidates if name not in used_names)))
    return named


def resolve_roots(sources: tuple[SourceConfig, ...], storage: str) -> DataRoots:
    """Return the directories that files of the sources may be in: the sources themselves and the run's storage."""
    return DataRoots.resolve(storage, *(source.path for source in sources if source.format != "procedural"))


def list_partitions(
    sources: tuple[SourceConfig, ...], seed: int, on_progress: Callable[[], None] = ignore_progress
) -> list[SourcePartition]:
    """Return the partitions of all sources in a fixed order; `on_progress` is called for each file in their folders.

    Raises ConfigError if a source doesn't exist.
    """
    return [part for source in name_sources(sources) for part in _partition_source(source, seed, on_progress)]


def _partition_source(source: SourceConfig, seed: int, on_progress: Callable[[], None]) -> Iterator[SourcePartition]:
    root = Path(source.path)
    base = SourcePartition(source=source.name, format=source.format, path=os.fsencode(root), samples=source.samples)
    if source.format == "procedural":
        yield replace(base, path=b"", seed=seed, level=source.level)
        return
    if not root.exists():
        raise ConfigError(f"source {source.name}: {root} does not exist; put the data there or change the path")
    if source.format == "imagefolder":
        if not root.is_dir():
            raise ConfigError(f"source {source.name}: {root} is not a directory; change the path or the format")
        yield base
        return
    names = walk_folder(root, on_progress)
    tars = sorted(root / name for name in names if name.endswith(".tar")) if root.is_dir() else [root]
    if not tars:
        raise ConfigError(
            f"source {source.name}: {root} contains no .tar files; change the path, or set format: imagefolder"
        )
    yield from (replace(base, path=os.fsencode(tar)) for tar in tars)


def list_items(
    partition: SourcePartition, roots: DataRoots, on_progress: Callable[[], None] = ignore_progress
) -> Iterator[Item]:
    """Yield the items of a partition, at most its `samples`; broken entries are items with a `problem`.

    `on_progress` is called again and again, also while nothing is yielded; an error that it raises ends the reading.
    """
    if partition.format == "procedural":
        return (
            Item(source=partition.source, key=f"{index:09d}", index=index, seed=partition.seed, level=partition.level)
            for index in range(partition.samples)
        )
    lister = list_image_folder if partition.format == "imagefolder" else list_tar
    path = Path(os.fsdecode(partition.path))
    return islice(lister(path, partition.source, roots, on_progress), partition.samples or None)
