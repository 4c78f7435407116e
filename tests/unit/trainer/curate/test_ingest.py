"""Raw data sets as people have them: what is listed, in which order, and what is counted as broken."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from sailvl_trainer.contract import SourceConfig
from sailvl_trainer.curate.artifacts import plan_units, read_items, write_items
from sailvl_trainer.curate.ingest import list_containers, list_items, name_sources
from sailvl_trainer.curate.items import Container, Item, clean_key, read_item
from sailvl_trainer.errors import ConfigError


def build_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def list_all(path: Path, form: str, samples: int = 0) -> list[Item]:
    sources = (SourceConfig(path=str(path), format=form, samples=samples),)  # type: ignore[arg-type]
    return [item for container in list_containers(sources, seed=0) for item in list_items(container)]


def told(items: list[Item]) -> list[tuple[str, str | None, str]]:
    """Key, caption as it will be read, and problem."""
    return [(i.key, None if i.problem else read_item(i).caption, i.problem) for i in items]


def test_an_image_folder(tmp_path: Path) -> None:
    (tmp_path / "cats" / "old").mkdir(parents=True)
    for name in ("b.JPG", "a.png", "cats/x.y.webp", "cats/old/tom.jpeg", "notes.md", ".hidden.png", "both.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a.txt").write_text("a picture\n")
    (tmp_path / "both.txt").write_text("from the text")
    (tmp_path / "captions.jsonl").write_text('{"image": "both.png", "caption": "from the record"}\n')
    (tmp_path / "cats" / "metadata.jsonl").write_text(
        '{"file_name": "old/tom.jpeg", "text": "a cat"}\n\n'
        "not json\n"
        '{"file_name": "gone.jpg", "text": "nothing"}\n'
        '["a", "list"]\n'
        '{"file_name": "x.y.webp", "text": 5}\n'
    )
    assert told(list_all(tmp_path, "imagefolder")) == [
        ("a", "a picture\n", ""),
        ("b", "", ""),
        ("both", "from the record", ""),
        ("cats-old-tom", "a cat", ""),
        ("cats-x-y", "", ""),
        ("cats-metadata-jsonl", None, "bad_record"),
        ("cats-metadata-jsonl", None, "bad_record"),
        ("cats-metadata-jsonl", None, "bad_record"),
        ("cats-gone-jpg", None, "missing"),
    ]


def test_names_and_captions_that_are_no_unicode(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"bytes")
    (tmp_path / "captions.jsonl").write_text('{"image": "\\ud800.jpg", "caption": "half"}\n')
    (tmp_path / "b.png").write_bytes(b"b")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    items = list_all(tmp_path, "imagefolder")
    assert told(items) == [("b", "caf\ufffd", ""), ("caf", "", ""), ("jpg", None, "missing")]
    listing = tmp_path / "listing.parquet"
    write_items(listing, items)
    assert read_items(listing, 0, len(items)) == items
    assert read_item(items[1]).data == b"bytes"


def test_tars(tmp_path: Path) -> None:
    record = json.dumps({"caption": "in json", "width": 3}).encode()
    build_tar(
        tmp_path / "b.tar",
        {"./0001.jpg": b"one", "./0001.txt": b"first", "./0002.JPG": b"two", "./0002.json": record, "./0003.txt": b"x"},
    )
    build_tar(tmp_path / "deep" / "a.tar", {"v1.0/k.png": b"p", "v1.0/k.json": b"[1]", "v1.0/k2.seg.png": b"s"})
    items = list_all(tmp_path, "webdataset")
    assert told(items) == [
        ("b-0001", "first", ""),
        ("b-0002", "in json", ""),
        ("a-v1-0-k", "", ""),
        ("a-v1-0-k2", "", ""),
    ]
    assert [read_item(item).data for item in items] == [b"one", b"two", b"p", b"s"]


@pytest.mark.parametrize("cut", [100, 700, 1600, 2048, 2100])
def test_a_tar_that_breaks_off_gives_what_is_whole(tmp_path: Path, cut: int) -> None:
    path = build_tar(tmp_path / "t.tar", {f"{i}.jpg": b"x" * 400 for i in range(4)})
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    items = list_all(path, "webdataset")
    assert [item.problem for item in items][-1] == "broken_tar"
    assert all(read_item(item).data == b"x" * 400 for item in items[:-1])
    assert len(items) - 1 <= cut // 1024


def test_a_damaged_header_ends_a_tar(tmp_path: Path) -> None:
    path = build_tar(tmp_path / "t.tar", {f"{i}.jpg": b"x" * 400 for i in range(4)})
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 10] ^= 1
    path.write_bytes(data)
    assert [item.problem for item in list_all(path, "webdataset")] == ["", "", "broken_tar"]


@pytest.mark.parametrize("data", [b"", b"no tar at all", b"\x1f\x8b" + bytes(600)], ids=["empty", "text", "zipped"])
def test_what_is_no_tar_is_counted(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(data)
    assert [item.problem for item in list_all(path, "webdataset")] == ["broken_tar"]


def test_a_limit_stops_the_listing(tmp_path: Path) -> None:
    for name in "abc":
        build_tar(tmp_path / f"{name}.tar", {f"{i}.jpg": b"x" for i in range(5)})
    containers = list_containers((SourceConfig(path=str(tmp_path), format="webdataset", samples=7),), seed=0)
    sizes = [len(list(list_items(container))) for container in containers]
    assert sizes == [5, 5, 5]
    assert [(u.container, u.first, u.count, u.item) for u in plan_units(tuple(containers), sizes)] == [
        (0, 0, 5, 0),
        (1, 0, 2, 5),
    ]


def test_units_cover_every_item_once() -> None:
    containers = tuple(Container(source=str(i), format="imagefolder", path="") for i in range(4))
    units = plan_units(containers, [300, 0, 1, 128])
    assert [(u.container, u.first, u.count, u.item) for u in units] == [
        (0, 0, 128, 0),
        (0, 128, 128, 128),
        (0, 256, 44, 256),
        (2, 0, 1, 300),
        (3, 0, 128, 301),
    ]
    large = plan_units(containers[:1], [10**7])
    assert len(large) < 3000
    assert sum(u.count for u in large) == 10**7


def test_sources_get_names_of_their_own() -> None:
    paths = ("/d/cats", "/e/cats", "", "/f/dogs.tar")
    given = tuple(SourceConfig(path=p, format="imagefolder" if p else "procedural") for p in paths)
    assert [s.name for s in name_sources(given)] == ["cats", "cats-2", "procedural", "dogs.tar"]
    assert name_sources((SourceConfig(path="/x", format="imagefolder", name="mine"),))[0].name == "mine"


@pytest.mark.parametrize(
    ("form", "words"),
    [("imagefolder", "does not exist; put the data there"), ("webdataset", "holds no .tar")],
)
def test_a_source_that_is_not_there(tmp_path: Path, form: str, words: str) -> None:
    path = tmp_path if form == "webdataset" else tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=words):
        list_all(path, form)


def test_keys_fit_into_a_tar() -> None:
    assert clean_key("a/b c.d/é") == "a-b-c-d"
    assert clean_key("x" * 300) == "x" * 64
