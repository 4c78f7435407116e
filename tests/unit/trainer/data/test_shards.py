"""Shards: written completely or not at all, read back unchanged, damage reported."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sailvl_trainer.data.shards import ShardPool, ShardReader, ShardWriter
from sailvl_trainer.data.synthetic import draw_question
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.hashes import describe_difference
from sailvl_trainer.storage.shard_manifest import (
    ShardManifest,
    list_shard_files,
    read_shard_manifest,
    write_shard_manifest,
)


def write_shard(directory: Path, name: str = "00000", samples: int = 5) -> ShardManifest:
    with ShardWriter(directory, name) as writer:
        for i in range(samples):
            writer.write(draw_question(0, i, 3))
    assert writer.info is not None
    return write_shard_manifest(directory, [writer.info])


def test_shard_reads_back_the_samples_written(tmp_path: Path) -> None:
    write_shard(tmp_path)
    reader = ShardReader(tmp_path, "00000")
    assert [reader.sample(row) for row in range(5)] == [draw_question(0, i, 3) for i in range(5)]
    assert reader.column("width").tolist() == [112] * 5


def test_shard_is_a_plain_webdataset_tar(tmp_path: Path) -> None:
    write_shard(tmp_path, samples=2)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        names = tar.getnames()
        assert names == [f"q3-000000{i}.{suffix}" for i in range(2) for suffix in ("png", "json")]
        image = tar.extractfile(names[0])
        assert image is not None
        assert image.read() == draw_question(0, 0, 3).image


def test_equal_samples_give_equal_hashes(tmp_path: Path) -> None:
    manifests = [write_shard(tmp_path / folder) for folder in ("a", "b")]
    assert manifests[0] == manifests[1] == read_shard_manifest(tmp_path / "a")


def test_key_longer_than_a_tar_header_is_kept(tmp_path: Path) -> None:
    sample = replace(draw_question(0, 0, 1), key="k" * 240)
    with ShardWriter(tmp_path, "00000") as writer:
        writer.write(sample)
        writer.write(draw_question(0, 1, 1))
    reader = ShardReader(tmp_path, "00000")
    assert [reader.sample(0), reader.sample(1)] == [sample, draw_question(0, 1, 1)]


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "q1-0000000"], ids=["dot", "slash", "empty", "duplicate"])
def test_duplicate_or_splittable_key_raises_value_error(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path, "00000") as writer:
        writer.write(draw_question(0, 0, 1))
        with pytest.raises(ValueError, match="sample key"):
            writer.write(replace(draw_question(0, 1, 1), key=key))
    assert writer.info is not None
    assert writer.info.samples == 1


def test_interrupted_writer_leaves_no_file(tmp_path: Path) -> None:
    def write_half() -> None:
        with ShardWriter(tmp_path, "00000") as writer:
            writer.write(draw_question(0, 0, 1))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_writer_are_deleted_and_never_published(tmp_path: Path) -> None:
    killed = ShardWriter(tmp_path, "00000")
    killed.write(draw_question(0, 9, 1))
    manifest = write_shard(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"00000.tar", "00000.arrow", "manifest.json"}
    with pytest.raises(FileNotFoundError):
        killed.__exit__(None, None, None)
    assert ShardReader(tmp_path, "00000").sample(0) == draw_question(0, 0, 3)
    assert manifest.samples == 5


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def replace_arrow(path: Path) -> None:
    path.with_suffix(".arrow").write_bytes(b"no arrow")


def break_json(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"messages"', b'"massages"'))


DAMAGES = [
    pytest.param(cut_off, r"record \d .*truncated", id="truncated"),
    pytest.param(lambda path: path.write_bytes(b""), "00000.tar", id="empty"),
    pytest.param(Path.unlink, "00000.tar", id="missing"),
    pytest.param(replace_arrow, "00000.tar", id="broken index"),
    pytest.param(break_json, "record 4", id="broken record"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_damaged_shard_raises_data_error_naming_it(
    tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    manifest = write_shard(tmp_path)
    damage(tmp_path / "00000.tar")
    with pytest.raises(DataError, match=named):
        ShardReader(tmp_path, "00000").sample(4)
    roots = DataRoots.resolve(tmp_path)
    differences = [describe_difference(file, roots) for file in list_shard_files(tmp_path, manifest)]
    assert [bool(difference) for difference in differences] == [damage is not replace_arrow, damage is replace_arrow]


def test_folder_without_manifest_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no data set"):
        read_shard_manifest(tmp_path)


def test_pool_evicts_the_least_recently_used_shard(tmp_path: Path) -> None:
    for name in ("00000", "00001", "00002"):
        write_shard(tmp_path, name, samples=1)
    pool = ShardPool([(tmp_path, f"0000{i}") for i in range(3)], limit=2)
    first = pool[0]
    assert pool[0] is first
    assert [pool[i].path.name for i in (1, 2)] == ["00001.tar", "00002.tar"]
    assert pool[0] is not first
    assert first.sample(0) == draw_question(0, 0, 3)


def test_numeric_columns_are_memory_mapped(tmp_path: Path) -> None:
    write_shard(tmp_path)
    column = ShardReader(tmp_path, "00000").column("image_offset")
    assert isinstance(column, np.ndarray)
    assert not column.flags.writeable
    assert not column.flags.owndata


def test_image_size_is_read_from_the_header_if_not_given(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "PNG")
    with ShardWriter(tmp_path, "00000") as writer:
        writer.write(replace(draw_question(0, 0, 1), image=buffer.getvalue()))
    reader = ShardReader(tmp_path, "00000")
    assert (reader.column("width")[0], reader.column("height")[0]) == (30, 20)
