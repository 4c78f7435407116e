"""The captioned pictures of Debian's tuxpaint-stamps-default as an image folder; called by `make`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path


def copy_stamps(tree: Path, directory: Path) -> int:
    """Every stamp that has a picture and an English caption, as NAME.png and NAME.txt; how many there were."""
    directory.mkdir(parents=True, exist_ok=True)
    found = 0
    for picture, caption in list_stamps(tree):
        name = name_stamp(picture)
        shutil.copyfile(picture, directory / f"{name}.png")
        (directory / f"{name}.txt").write_text(caption, encoding="utf-8")
        found += 1
    return found


def list_stamps(tree: Path) -> Iterator[tuple[Path, str]]:
    """Pictures and captions in the order of their paths. A caption is a file's first line; translations follow it."""
    for text in sorted(tree.rglob("*.txt")):
        picture = text.with_suffix(".png")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        if picture.exists() and lines and lines[0].strip():
            yield picture, lines[0].strip()


def name_stamp(picture: Path) -> str:
    """The last parts of its path, as a WebDataset key."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(picture.with_suffix("").parts[-3:]).lower()).strip("-")
