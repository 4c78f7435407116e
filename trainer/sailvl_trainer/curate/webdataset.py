"""List WebDataset tars: adjacent files of one key are a sample; the caption is KEY.txt, or "caption" in KEY.json."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from sailvl_trainer.curate.items import IMAGE_SUFFIXES, MAX_TEXT_BYTES, Item, clean_key, clean_text

TarGroup = dict[str, tarfile.TarInfo]
"""Members of one key by suffix, which may contain dots."""


def list_tar(path: Path, source: str) -> Iterator[Item]:
    """Yield one item per key with an image; a broken tar yields its complete items, then an item with the problem."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            for key, group in _iter_groups(tar):
                item = _build_item(path, source, key, group, tar)
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


def _iter_groups(tar: tarfile.TarFile) -> Iterator[tuple[str, TarGroup]]:
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


def _build_item(path: Path, source: str, key: str, group: TarGroup, tar: tarfile.TarFile) -> Item | None:
    """Return the group's item, or None if it holds no image."""
    suffix = next((s for s in group if s.rpartition(".")[2] in IMAGE_SUFFIXES), None)
    if suffix is None:
        return None
    member = group[suffix]
    return Item(
        source=source,
        key=clean_key(f"{path.stem}-{key.removeprefix('./')}"),
        suffix=suffix.rpartition(".")[2],
        caption=_read_caption(group, tar),
        path=os.fsencode(path),
        offset=member.offset_data,
        size=member.size,
    )


def _read_caption(group: TarGroup, tar: tarfile.TarFile) -> str | None:
    for suffix in ("txt", "json"):
        file = tar.extractfile(group[suffix]) if suffix in group else None
        if file is not None:
            text = file.read(MAX_TEXT_BYTES).decode("utf-8", "replace")
            return text if suffix == "txt" else _parse_caption(text)
    return None


def _parse_caption(text: str) -> str | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    value = record.get("caption") if isinstance(record, dict) else None
    return value if isinstance(value, str) else None
