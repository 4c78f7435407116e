"""Raw data sets as lists of items, in a fixed order, without reading a pixel."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sailvl_trainer.contract import SourceConfig
from sailvl_trainer.data.procedural import draw_caption
from sailvl_trainer.runtime.errors import ConfigError

SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One raw picture and where its bytes are."""

    source: str
    key: str
    suffix: str
    caption: str | None
    path: str
    offset: int = 0
    size: int = -1
    """Bytes from offset; -1: the whole file."""
    index: int = -1
    """procedural: number of the sample; the path is empty."""
    seed: int = 0
    level: int = 1

    def read(self) -> bytes:
        """The encoded picture. Raises OSError."""
        if self.index >= 0:
            drawn = draw_caption(self.seed, self.index, self.level).image
            assert drawn is not None, "every drawn sample has a picture"
            return drawn
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def list_items(source: SourceConfig, seed: int) -> list[Item]:
    """All items of a source. Raises ConfigError for one that isn't there."""
    if source.format != "procedural" and not Path(source.path).exists():
        raise ConfigError(f"source {source.name}: {source.path} does not exist; put the data there or change the path")
    items = {"imagefolder": _image_folder, "webdataset": _webdataset, "procedural": _procedural}[source.format]
    return list(islice(items(source, seed), source.samples or None))


def _image_folder(source: SourceConfig, _: int) -> Iterator[Item]:
    root = Path(source.path)
    captions = _read_captions(root)
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower().removeprefix(".") in SUFFIXES):
        name = str(path.relative_to(root))
        beside = path.with_suffix(".txt")
        caption = captions.get(name) or (beside.read_text(errors="replace").strip() if beside.exists() else None)
        yield Item(
            source=source.name,
            key=_clean(name.rsplit(".", 1)[0]),
            suffix=path.suffix.lower().removeprefix("."),
            caption=caption,
            path=str(path),
        )


def _webdataset(source: SourceConfig, _: int) -> Iterator[Item]:
    root = Path(source.path)
    for path in [root] if root.is_file() else sorted(root.rglob("*.tar")):
        yield from _read_tar(path, source.name)


def _procedural(source: SourceConfig, seed: int) -> Iterator[Item]:
    for index in range(source.samples):
        sample = draw_caption(seed, index, source.level)
        yield Item(
            source=source.name,
            key=sample.key,
            suffix=sample.suffix,
            caption=str(sample.meta["caption"]),
            path="",
            index=index,
            seed=seed,
            level=source.level,
        )


def _read_tar(path: Path, source: str) -> Iterator[Item]:
    """Members of one key stand together; the caption is in .txt, or in .json under "caption"."""
    group: dict[str, tarfile.TarInfo] = {}
    key = ""
    with tarfile.open(path) as tar:
        for member in [m for m in tar if m.isfile()] + [tarfile.TarInfo("")]:
            stem, _, suffix = member.name.partition(".")
            if stem != key and group:
                yield from _tar_item(path, source, key, group, tar)
                group = {}
            key = stem
            group[suffix.lower()] = member


def _tar_item(
    path: Path, source: str, key: str, group: dict[str, tarfile.TarInfo], tar: tarfile.TarFile
) -> Iterator[Item]:
    suffix = next((s for s in group if s in SUFFIXES), None)
    if suffix is None:
        return
    member = group[suffix]
    yield Item(
        source=source,
        key=_clean(f"{path.stem}-{key}"),
        suffix=suffix,
        caption=_tar_caption(group, tar),
        path=str(path),
        offset=member.offset_data,
        size=member.size,
    )


def _tar_caption(group: dict[str, tarfile.TarInfo], tar: tarfile.TarFile) -> str | None:
    for suffix in ("txt", "json"):
        file = tar.extractfile(group[suffix]) if suffix in group else None
        if file is None:
            continue
        text = file.read().decode(errors="replace").strip()
        return text if suffix == "txt" else _caption_of(text)
    return None


def _caption_of(text: str) -> str | None:
    try:
        value = json.loads(text).get("caption")
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None


def _read_captions(root: Path) -> dict[str, str]:
    """File name to caption, from captions.jsonl ({"image", "caption"}) or metadata.jsonl ({"file_name", "text"})."""
    captions: dict[str, str] = {}
    for path in (root / name for name in CAPTION_FILES if (root / name).exists()):
        for line in path.read_text().splitlines():
            entry = json.loads(line) if line.strip() else {}
            name = entry.get("image") or entry.get("file_name")
            if name:
                captions[name] = entry.get("caption") or entry.get("text") or ""
    return captions


def _clean(name: str) -> str:
    """WebDataset splits keys at dots and folders at slashes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
