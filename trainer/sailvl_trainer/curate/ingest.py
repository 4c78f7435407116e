"""Raw data sets as containers (a folder, a tar, a rule) of items in a fixed order, listed without decoding a pixel.

Called by passes.py: the containers once, each container's items by whichever rank takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from sailvl_trainer.contract import SourceConfig
from sailvl_trainer.curate.image_folder import list_folder
from sailvl_trainer.curate.items import Container, Item
from sailvl_trainer.curate.webdataset import list_tar
from sailvl_trainer.errors import ConfigError


def name_sources(sources: tuple[SourceConfig, ...]) -> list[SourceConfig]:
    """Every source with a name: the given one, else the last part of its path; a second one of a name gets a number."""
    named: list[SourceConfig] = []
    for source in sources:
        first = source.name or Path(source.path).name or source.format
        taken = {other.name for other in named}
        names = (first if n == 1 else f"{first}-{n}" for n in range(1, len(sources) + 2))
        named.append(replace(source, name=next(name for name in names if name not in taken)))
    return named


def list_containers(sources: tuple[SourceConfig, ...], seed: int) -> list[Container]:
    """All containers, source by source, in a fixed order. Raises ConfigError for a source that isn't there."""
    return [found for source in name_sources(sources) for found in _containers(source, seed)]


def _containers(source: SourceConfig, seed: int) -> Iterator[Container]:
    base = Container(source=source.name, format=source.format, path=source.path, samples=source.samples)
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
        raise ConfigError(f"source {source.name}: {root} holds no .tar; change the path, or the format to imagefolder")
    yield from (replace(base, path=str(tar)) for tar in tars)


def list_items(container: Container) -> Iterator[Item]:
    """A container's items, at most `samples` of them. What is broken is an item too, with its problem."""
    if container.format == "procedural":
        return (
            Item(source=container.source, key=f"{index:09d}", index=index, seed=container.seed, level=container.level)
            for index in range(container.samples)
        )
    lister = list_folder if container.format == "imagefolder" else list_tar
    return islice(lister(Path(container.path), container.source), container.samples or None)
