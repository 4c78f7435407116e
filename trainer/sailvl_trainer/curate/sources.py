"""Raw data sets as partitions and items, listed in a fixed order without decoding an image.

Image folders have images at any depth, with captions in NAME.txt, captions.jsonl or metadata.jsonl. In WebDataset tars
adjacent files of one key are a sample, whose caption is KEY.txt, or "caption" in KEY.json. Called by stage.py: the
partitions are listed once, and the items of each partition by the rank that claims it.
"""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from sailvl_trainer.contract import SourceConfig
from sailvl_trainer.curate.items import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    Item,
    SourcePartition,
    clean_key,
    clean_text,
    get_suffix,
)
from sailvl_trainer.errors import ConfigError

CAPTION_FILES = frozenset({"captions.jsonl", "metadata.jsonl"})
"""Caption files of an image folder. Each line is an object: {"image" or "file_name": path relative to this file,
"caption" or "text": the caption}."""
TarGroup = dict[str, tarfile.TarInfo]
"""Members of one key by suffix, which may contain dots."""


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


def list_image_folder(root: Path, source: str) -> Iterator[Item]:
    """Yield the images by path, then an item with a problem for each bad line and for each caption without an image."""
    files = sorted(_walk_folder(root))
    captions: dict[str, str] = {}
    problems: list[Item] = []
    for name in files:
        if Path(name).name in CAPTION_FILES:
            _read_caption_file(root, name, source, captions, problems)
    images = [name for name in files if get_suffix(name) in IMAGE_SUFFIXES]
    texts = frozenset(name for name in files if name.endswith(".txt"))
    for name in images:
        text = f"{name.rsplit('.', 1)[0]}.txt"
        yield Item(
            source=source,
            key=clean_key(name.rsplit(".", 1)[0]),
            suffix=get_suffix(name),
            caption=captions.pop(name, None),
            caption_file=os.fsencode(root / text) if text in texts else b"",
            path=os.fsencode(root / name),
        )
    yield from problems
    for name in captions:
        detail = f"{clean_text(name)} has a caption but no image file"
        yield Item(source=source, key=clean_key(name), problem="missing", detail=detail)


def _walk_folder(root: Path) -> Iterator[str]:
    """Yield the paths of all files relative to the root, without hidden ones and without folders that deny access.

    Raises OSError if a folder can't be listed for any other reason, because an outage would silently reduce the data.
    """
    for folder, folders, files in os.walk(root, onerror=_raise_unless_access_denied):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith("."):
                yield name if prefix == "." else f"{prefix}/{name}"


def _raise_unless_access_denied(error: OSError) -> None:
    if error.errno not in (errno.EACCES, errno.EPERM):
        raise error


def _read_caption_file(root: Path, name: str, source: str, captions: dict[str, str], problems: list[Item]) -> None:
    """Add the records of a caption file to `captions`, by image path from the root, and its bad lines to `problems`."""
    prefix = name.rpartition("/")[0]
    with (root / name).open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _parse_caption_line(line)
            if record is None:
                detail = f"{name}, line {number}: not an object with image and caption"
                problems.append(Item(source=source, key=clean_key(name), problem="bad_record", detail=detail))
            else:
                captions[os.path.normpath(f"{prefix}/{record[0]}".lstrip("/"))] = record[1]


def _parse_caption_line(line: str) -> tuple[str, str] | None:
    """Return image name and caption of a line, or None if it is not a valid record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    name = record.get("image") or record.get("file_name")
    caption = record.get("caption") or record.get("text") or ""
    return (name, caption) if isinstance(name, str) and isinstance(caption, str) else None


def list_tar(path: Path, source: str) -> Iterator[Item]:
    """Yield one item per key with an image; a broken tar yields its complete items, then an item with the problem."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            for key, group in _iter_tar_groups(tar):
                item = _build_tar_item(path, source, key, group, tar)
                if item is not None:
                    yield item
            _check_end_marker(tar)
    except (tarfile.TarError, EOFError) as error:
        detail = f"{path.name} is truncated or not an uncompressed tar: {clean_text(str(error))}"
        yield Item(source=source, key=clean_key(path.stem), problem="broken_tar", detail=detail)


def _check_end_marker(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless reading stopped at the end marker, a block of zeros.

    After the first header, tarfile also treats a damaged header, or a file truncated between two members, as the end.
    """
    assert tar.fileobj is not None, "the tar is open"
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"neither a header nor the end marker at byte {tar.offset}")


def _iter_tar_groups(tar: tarfile.TarFile) -> Iterator[tuple[str, TarGroup]]:
    """Yield key and members of adjacent files with one key. As in WebDataset, a key ends at a file name's first dot."""
    key, group = "", TarGroup()
    for member in tar:
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if group and f"{folder}/{stem}" != key:
            yield key, group
            group = {}
        key = f"{folder}/{stem}"
        group[suffix.lower()] = member
    if group:
        yield key, group


def _build_tar_item(path: Path, source: str, key: str, group: TarGroup, tar: tarfile.TarFile) -> Item | None:
    """Return the group's item, or None if it holds no image."""
    suffix = next((s for s in group if s.rpartition(".")[2] in IMAGE_SUFFIXES), None)
    if suffix is None:
        return None
    member = group[suffix]
    return Item(
        source=source,
        key=clean_key(f"{path.stem}-{key.removeprefix('./')}"),
        suffix=suffix.rpartition(".")[2],
        caption=_read_tar_caption(group, tar),
        path=os.fsencode(path),
        offset=member.offset_data,
        size=member.size,
    )


def _read_tar_caption(group: TarGroup, tar: tarfile.TarFile) -> str | None:
    for suffix in ("txt", "json"):
        file = tar.extractfile(group[suffix]) if suffix in group else None
        if file is not None:
            text = file.read(MAX_TEXT_BYTES).decode("utf-8", "replace")
            return text if suffix == "txt" else _parse_tar_caption(text)
    return None


def _parse_tar_caption(text: str) -> str | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    value = record.get("caption") if isinstance(record, dict) else None
    return value if isinstance(value, str) else None
