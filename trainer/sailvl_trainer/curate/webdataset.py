"""WebDataset tars: files of one key stand together; the caption is KEY.txt, or "caption" in KEY.json."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from sailvl_trainer.curate.items import MAX_TEXT, SUFFIXES, Item, clean_key, clean_text

Group = dict[str, tarfile.TarInfo]


def list_tar(path: Path, source: str) -> Iterator[Item]:
    """One item a key with a picture; a tar that breaks off gives what is whole, then an item that says so."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            for key, group in _groups(tar):
                item = _build_item(path, source, key, group, tar)
                if item is not None:
                    yield item
            _require_end(tar)
    except (tarfile.TarError, EOFError) as error:
        words = f"{path.name} breaks off or is no plain tar: {clean_text(str(error))}"
        yield Item(source=source, key=clean_key(path.stem), problem="broken_tar", detail=words)


def _require_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError unless the mark of the end, a block of zeros, is where reading stopped: after the first header
    tarfile takes a damaged one, or a file cut off between two, for the end."""
    assert tar.fileobj is not None, "the tar is open"
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")


def _groups(tar: tarfile.TarFile) -> Iterator[tuple[str, Group]]:
    """Neighbours of one key, by suffix. As WebDataset does, a key ends at the first dot of the file's name."""
    key, group = "", Group()
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


def _build_item(path: Path, source: str, key: str, group: Group, tar: tarfile.TarFile) -> Item | None:
    suffix = next((s for s in group if s.rpartition(".")[2] in SUFFIXES), None)
    if suffix is None:
        return None
    member = group[suffix]
    return Item(
        source=source,
        key=clean_key(f"{path.stem}-{key.removeprefix('./')}"),
        suffix=suffix.rpartition(".")[2],
        caption=_caption(group, tar),
        path=os.fsencode(path),
        offset=member.offset_data,
        size=member.size,
    )


def _caption(group: Group, tar: tarfile.TarFile) -> str | None:
    for suffix in ("txt", "json"):
        file = tar.extractfile(group[suffix]) if suffix in group else None
        if file is not None:
            text = file.read(MAX_TEXT).decode("utf-8", "replace")
            return text if suffix == "txt" else _caption_of(text)
    return None


def _caption_of(text: str) -> str | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    value = record.get("caption") if isinstance(record, dict) else None
    return value if isinstance(value, str) else None
