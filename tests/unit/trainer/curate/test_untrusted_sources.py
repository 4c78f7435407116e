"""Tests of curation with files that are no files, links that lead out of the data, and text without a limit.

Each hostile record is counted with its reason; it neither blocks the rank nor ends the stage.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from sailvl_trainer.contract import CurateConfig, SourceConfig
from sailvl_trainer.curate.captions import MAX_CAPTION_LENGTH, MAX_TEXT_BYTES, classify_caption, clean_caption
from sailvl_trainer.curate.image_folder import iter_lines
from sailvl_trainer.curate.items import SourcePartition
from sailvl_trainer.curate.sources import list_items, list_partitions, resolve_roots
from sailvl_trainer.curate.verify import VerifiedItem, verify_item
from sailvl_trainer.storage.codec import decode, encode
from tests.support.builders.images import draw_noise, encode_image

PNG = encode_image(draw_noise(), "PNG")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return an empty source beside a private image with its caption."""
    (tmp_path / "private.png").write_bytes(PNG)
    (tmp_path / "private.txt").write_text("words of another run")
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def verify_source(path: Path, form: str = "imagefolder", storage: str = "/nonexistent") -> list[VerifiedItem]:
    """List and verify all items of a source."""
    sources = (SourceConfig(path=str(path), format=form),)  # type: ignore[arg-type]
    config, roots = CurateConfig(sources=sources, min_side=16), resolve_roots(sources, storage)
    partitions = decode(list[SourcePartition], encode(list_partitions(sources, seed=0)))  # as the stage stores them
    items = [item for partition in partitions for item in list_items(partition, roots)]
    return [verify_item(item, config, 28, roots) for item in items]


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


UNTRUSTED_IMAGES = [
    pytest.param(os.mkfifo, "irregular_file", id="pipe without a writer"),
    pytest.param(link("/dev/zero"), "irregular_file", id="link to a device without an end"),
    pytest.param(link("/proc/self/environ"), "outside_source", id="link to the environment"),
    pytest.param(link("../private.png"), "outside_source", id="link to another data set"),
    pytest.param(link("a.png"), "missing", id="link to itself"),
    pytest.param(link("gone"), "missing", id="dangling link"),
    pytest.param(link("x" * 300), "missing", id="link with too long a name"),
    pytest.param(link("."), "irregular_file", id="link to a folder"),
]


@pytest.mark.parametrize(("make", "outcome"), UNTRUSTED_IMAGES)
def test_untrusted_image_or_caption_is_counted(source: Path, make: Callable[[Path], None], outcome: str) -> None:
    make(source / "a.png")
    (source / "a.txt").write_text("a caption of an image")
    (source / "b.png").write_bytes(PNG)
    make(source / "b.txt")
    (source / "c.png").write_bytes(PNG)
    (source / "c.txt").write_text("an honest caption")
    found = verify_source(source)
    assert [result.outcome for result in found] == [outcome, outcome, "ok"]
    assert [bool(result.detail) for result in found] == [True, True, False]
    assert [result.text for result in found] == ["", "", "an honest caption"]


@pytest.mark.parametrize(("make", "outcome"), UNTRUSTED_IMAGES)
def test_untrusted_caption_file_is_counted(source: Path, make: Callable[[Path], None], outcome: str) -> None:
    make(source / "captions.jsonl")
    (source / "b.png").write_bytes(PNG)
    found = verify_source(source)
    assert [result.outcome for result in found] == ["no_caption", outcome]
    assert "captions.jsonl" in found[1].detail


@pytest.mark.parametrize(("make", "outcome"), UNTRUSTED_IMAGES)
def test_untrusted_tar_is_counted(source: Path, make: Callable[[Path], None], outcome: str) -> None:
    make(source / "a.tar")
    (found,) = verify_source(source, "webdataset")
    assert found.outcome == outcome
    assert "a.tar" in found.detail


def test_link_from_the_source_to_the_storage_is_followed(source: Path, tmp_path: Path) -> None:
    (source / "a.png").symlink_to("../private.png")
    (source / "a.txt").symlink_to("../private.txt")
    assert [result.outcome for result in verify_source(source, storage=str(tmp_path))] == ["ok"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return the folder of a repository in the cache of Hugging Face, with an image and its caption."""
    repository = tmp_path / "hub/datasets--team--pets"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots/1a2b").mkdir(parents=True)
    for name, data in (("a.png", PNG), ("a.txt", b"a caption of an image")):
        (repository / "blobs" / hashlib.sha256(data).hexdigest()).write_bytes(data)
        (repository / "snapshots/1a2b" / name).symlink_to(f"../../blobs/{hashlib.sha256(data).hexdigest()}")
    return repository


def test_snapshot_of_hugging_face_is_read_if_the_source_or_the_storage_contains_its_blobs(
    cache: Path, tmp_path: Path
) -> None:
    assert [result.outcome for result in verify_source(cache)] == ["ok"]
    assert [result.outcome for result in verify_source(cache / "snapshots/1a2b", storage=str(tmp_path))] == ["ok"]


def test_snapshot_of_hugging_face_whose_blobs_are_outside_is_refused_with_what_to_do(cache: Path) -> None:
    (found,) = verify_source(cache / "snapshots/1a2b", storage="/nonexistent")
    assert found.outcome == "outside_source"
    assert "set the source to the repository's folder in the cache" in found.detail
    assert "huggingface-cli download --local-dir" in found.detail


def test_link_to_a_folder_is_not_walked(source: Path, tmp_path: Path) -> None:
    (source / "others").symlink_to(tmp_path)
    (source / "loop").symlink_to(".")
    assert verify_source(source) == []


def test_folders_of_any_depth_are_listed_without_recursion(source: Path) -> None:
    here = os.open(source, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("a.png", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    try:
        assert [result.outcome for result in verify_source(source)] == ["no_caption"]
    finally:
        subprocess.run(["rm", "-r", source], check=True)  # rmtree is recursive


def test_tar_whose_name_is_not_utf8_is_read(source: Path) -> None:
    with open(os.fsencode(source) + b"/caf\xe9.tar", "wb") as file:
        file.write(bytes(1024))
    (source / "b.tar").write_bytes(b"no tar")
    assert [result.detail.partition(" ")[0] for result in verify_source(source, "webdataset")] == ["b.tar"]


RECORDS = [
    pytest.param(b"[" * 100_000, id="nested too deeply"),
    pytest.param(b'{"image": "a.png", "caption": ' + b"9" * 5000 + b"}", id="integer of 5,000 digits"),
    pytest.param(b'{"image": "a.png", "caption": 1e999999}', id="infinite number"),
    pytest.param(b'{"image": "a.png", "caption": "' + b"x" * MAX_TEXT_BYTES + b'"}', id="longer than the limit"),
    pytest.param(b"\xff\xfe\x00", id="not UTF-8"),
]


@pytest.mark.parametrize("record", RECORDS)
def test_invalid_record_is_counted_and_the_next_one_is_read(source: Path, record: bytes) -> None:
    (source / "a.png").write_bytes(PNG)
    (source / "captions.jsonl").write_bytes(record + b'\n{"image": "a.png", "image": "a.png", "text": "honest"}\n')
    good, bad = verify_source(source)
    assert (good.outcome, good.text, bad.outcome) == ("ok", "honest", "invalid_record")
    assert bad.detail.startswith("captions.jsonl, line 1: ")


@pytest.mark.parametrize("name", ["a\\u0000.png", "../private.png", "/etc/passwd", "\\ud800.png", "x" * 5000])
def test_record_of_an_image_outside_of_the_folder_is_missing(source: Path, name: str) -> None:
    (source / "captions.jsonl").write_text(f'{{"image": "{name}", "text": "a caption"}}\n')
    (found,) = verify_source(source)
    assert found.outcome == "missing"
    assert len(found.detail) <= 300


def test_long_line_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    with path.open("wb") as file:
        file.truncate(32 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b"\nnext")
    tracemalloc.start()
    try:
        with path.open("rb") as file:
            assert list(iter_lines(file, MAX_TEXT_BYTES)) == [None, b"next"]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_combining_marks_are_normalised_in_linear_time() -> None:
    started = time.perf_counter()
    caption = clean_caption("caption o" + "\u0316\u0301" * 200_000 + " end")
    assert time.perf_counter() - started < 2
    assert caption.startswith("caption ")
    assert classify_caption(caption) == "ok"


def test_long_caption_is_cut_and_still_too_long() -> None:
    for text in ("x" * 100_000, "x" * MAX_CAPTION_LENGTH + " y" * 9, "一 " * 100_000):
        caption = clean_caption(text)
        assert MAX_CAPTION_LENGTH < len(caption) <= MAX_CAPTION_LENGTH + 2
        assert classify_caption(caption) == "long_caption"
