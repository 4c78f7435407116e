"""Tests of listing raw data sets: items, their order, their captions and broken entries."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sailvl_trainer.contract import SourceConfig
from sailvl_trainer.curate.artifacts import read_items, write_items
from sailvl_trainer.curate.items import Item, clean_key, read_item
from sailvl_trainer.curate.sources import list_items, list_partitions, name_sources, resolve_roots
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.storage.data_files import DataRoots
from tests.support.builders.curation import build_tar

EVERYWHERE = DataRoots.resolve("/")


def list_source(path: Path, form: str, samples: int = 0) -> list[Item]:
    sources = (SourceConfig(path=str(path), format=form, samples=samples),)  # type: ignore[arg-type]
    roots = resolve_roots(sources, storage=str(path))
    return [item for partition in list_partitions(sources, seed=0) for item in list_items(partition, roots)]


def summarise(items: list[Item]) -> list[tuple[str, str | None, str]]:
    """Return key, caption and problem of each item; the caption as verification reads it."""
    return [(i.key, None if i.problem else read_item(i, EVERYWHERE).caption, i.problem) for i in items]


def test_image_folder_lists_images_captions_and_problems(tmp_path: Path) -> None:
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
    assert summarise(list_source(tmp_path, "imagefolder")) == [
        ("a", "a picture\n", ""),
        ("b", "", ""),
        ("both", "from the record", ""),
        ("cats-old-tom", "a cat", ""),
        ("cats-x-y", "", ""),
        ("cats-metadata-jsonl", None, "invalid_record"),
        ("cats-gone-jpg", None, "missing"),
        ("cats-metadata-jsonl", None, "invalid_record"),
        ("cats-metadata-jsonl", None, "invalid_record"),
    ]


def test_image_folder_accepts_names_and_captions_that_are_not_utf8(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"bytes")
    (tmp_path / "captions.jsonl").write_text('{"image": "\\ud800.jpg", "caption": "half"}\n')
    (tmp_path / "b.png").write_bytes(b"b")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    items = list_source(tmp_path, "imagefolder")
    assert summarise(items) == [("b", "caf\ufffd", ""), ("caf", "", ""), ("jpg", None, "missing")]
    listing = tmp_path / "listing.parquet"
    write_items(listing, items)
    assert read_items(listing, 0, len(items)) == items
    assert read_item(items[1], EVERYWHERE).image == b"bytes"


def test_webdataset_lists_one_item_per_key_with_an_image(tmp_path: Path) -> None:
    record = json.dumps({"caption": "in json", "width": 3}).encode()
    build_tar(
        tmp_path / "b.tar",
        {"./0001.jpg": b"one", "./0001.txt": b"first", "./0002.JPG": b"two", "./0002.json": record, "./0003.cls": b"x"},
    )
    build_tar(tmp_path / "deep" / "a.tar", {"v1.0/k.png": b"p", "v1.0/k.json": b"{}", "v1.0/k2.seg.png": b"s"})
    items = list_source(tmp_path, "webdataset")
    assert summarise(items) == [
        ("b-0001", "first", ""),
        ("b-0002", "in json", ""),
        ("a-v1-0-k", "", ""),
        ("a-v1-0-k2", "", ""),
    ]
    assert [read_item(item, EVERYWHERE).image for item in items] == [b"one", b"two", b"p", b"s"]


def test_hidden_files_of_macos_do_not_divide_the_files_of_a_key(tmp_path: Path) -> None:
    files = {}
    for name, data in (("1.jpg", b"one"), ("1.txt", b"first"), ("2.jpg", b"two"), ("2.txt", b"second")):
        files |= {f"./._{name}": b"attributes", f"./{name}": data}
    build_tar(tmp_path / "a.tar", files | {"__MACOSX/._3.jpg": b"attributes", ".jpg": b"no name"})
    items = list_source(tmp_path, "webdataset")
    assert summarise(items) == [("a-1", "first", ""), ("a-2", "second", "")]
    assert [read_item(item, EVERYWHERE).image for item in items] == [b"one", b"two"]


@pytest.mark.parametrize("cut", [100, 700, 1600, 2048, 2100])
def test_truncated_tar_yields_complete_items_and_a_problem(tmp_path: Path, cut: int) -> None:
    path = build_tar(tmp_path / "t.tar", {f"{i}.jpg": b"x" * 400 for i in range(4)})
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    items = list_source(path, "webdataset")
    assert [item.problem for item in items][-1] == "invalid_tar"
    assert all(read_item(item, EVERYWHERE).image == b"x" * 400 for item in items[:-1])
    assert len(items) - 1 <= cut // 1024


def test_damaged_header_ends_the_tar_with_a_problem(tmp_path: Path) -> None:
    path = build_tar(tmp_path / "t.tar", {f"{i}.jpg": b"x" * 400 for i in range(4)})
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 10] ^= 1
    path.write_bytes(data)
    assert [item.problem for item in list_source(path, "webdataset")] == ["", "", "invalid_tar"]


@pytest.mark.parametrize("data", [b"", b"no tar at all", b"\x1f\x8b" + bytes(600)], ids=["empty", "text", "gzip"])
def test_file_that_is_not_a_tar_is_a_problem(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(data)
    assert [item.problem for item in list_source(path, "webdataset")] == ["invalid_tar"]


def test_each_partition_is_listed_up_to_the_limit(tmp_path: Path) -> None:
    for name in "abc":
        build_tar(tmp_path / f"{name}.tar", {f"{i}.jpg": b"x" for i in range(5)})
    for samples, count in ((7, 5), (3, 3)):
        source = SourceConfig(path=str(tmp_path), format="webdataset", samples=samples)
        assert [len(list(list_items(p, EVERYWHERE))) for p in list_partitions((source,), seed=0)] == [count] * 3


def test_sources_get_unique_names() -> None:
    paths = ("/d/cats", "/e/cats", "", "/f/dogs.tar")
    given = tuple(SourceConfig(path=p, format="imagefolder" if p else "procedural") for p in paths)
    assert [s.name for s in name_sources(given)] == ["cats", "cats-2", "procedural", "dogs.tar"]
    assert name_sources((SourceConfig(path="/x", format="imagefolder", name="mine"),))[0].name == "mine"


@pytest.mark.parametrize(
    ("form", "message"),
    [("imagefolder", "does not exist; put the data there"), ("webdataset", "contains no .tar files")],
)
def test_missing_source_is_a_config_error(tmp_path: Path, form: str, message: str) -> None:
    path = tmp_path if form == "webdataset" else tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=message):
        list_source(path, form)


def test_clean_key_fits_into_a_tar_and_holds_no_special_characters() -> None:
    assert clean_key("a/b c.d/é") == "a-b-c-d"
    assert clean_key("x" * 300) == "x" * 64
