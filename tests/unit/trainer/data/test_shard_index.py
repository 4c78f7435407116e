"""Indexes of shards: damaged and forged ones are refused before a value is used, and the footer is never believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sailvl_trainer.data.shard_index import COUNTED_BY, SCHEMA
from sailvl_trainer.data.shards import ShardReader, ShardWriter
from sailvl_trainer.data.synthetic import draw_question
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.shard_manifest import read_shard_manifest
from tests.support.fuzz import draw_generators, mutate_bytes

SAMPLES = 3


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Return the path of a shard's index."""
    with ShardWriter(tmp_path, "00000") as writer:
        for number in range(SAMPLES):
            writer.write(draw_question(0, number, 1))
    return tmp_path / "00000.arrow"


def read_table(path: Path) -> pa.Table:
    with pa.ipc.open_file(path) as file:
        return file.read_all()


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)


def read_shard(path: Path) -> None:
    """Read a shard as training does."""
    reader = ShardReader(path.parent, path.stem)
    for row in range(len(reader)):
        reader.sample(row)


IMPOSSIBLE = [
    pytest.param("image_offset", -1, "record 1 .*its image ends beyond", id="negative offset"),
    pytest.param("image_size", -5, "record 1 .*its image ends beyond", id="negative size"),
    pytest.param("json_size", 2**62, "record 1 .*its json ends beyond", id="size beyond the tar"),
    pytest.param("json_offset", 2**63 - 1, "record 1 .*its json ends beyond", id="sum that overflows"),
    pytest.param("width", 0, "record 1 .*no width or no height", id="image without width"),
    pytest.param("height", -7, "record 1 .*no width or no height", id="negative height"),
    pytest.param("text_tokens", -2, "record 1 .*number of tokens is negative", id="negative tokens"),
    pytest.param("key", None, "empty cells", id="empty cell"),
]


@pytest.mark.parametrize(("column", "value", "message"), IMPOSSIBLE)
def test_row_with_an_impossible_value_is_named(column: str, value: object, message: str, shard: Path) -> None:
    rows = read_table(shard).to_pylist()
    rows[1][column] = value
    write_table(shard, pa.Table.from_pylist(rows, schema=SCHEMA))
    with pytest.raises(DataError, match=message):
        ShardReader(shard.parent, shard.stem)


def test_uncounted_rows_of_an_index_that_claims_to_be_counted_are_refused(shard: Path) -> None:
    write_table(shard, read_table(shard).replace_schema_metadata({COUNTED_BY: b"a tokenizer"}))
    with pytest.raises(DataError, match=r"record 0 .*number of tokens is negative"):
        ShardReader(shard.parent, shard.stem)


def repeat_rows(path: Path) -> None:
    write_table(path, pa.concat_tables([read_table(path)] * 2))


def drop_column(path: Path) -> None:
    write_table(path, read_table(path).drop_columns(["width"]))


def cast_column(path: Path) -> None:
    write_table(path, read_table(path).cast(SCHEMA.set(1, pa.field("image_offset", pa.float64()))))


def compress(path: Path) -> None:
    write_table(path, read_table(path), compression="zstd")


def lengthen_metadata(path: Path) -> None:
    write_table(path, read_table(path).replace_schema_metadata({COUNTED_BY: b"x" * 1000}))


def break_metadata(path: Path) -> None:
    write_table(path, read_table(path).replace_schema_metadata({COUNTED_BY: b"\xff"}))


def encode_as_dictionary(path: Path) -> None:
    write_table(path, read_table(path).set_column(5, "suffix", read_table(path)["suffix"].dictionary_encode()))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FORGED: list[Callable[[Path], None]] = [
    repeat_rows,
    drop_column,
    cast_column,
    compress,
    lengthen_metadata,
    break_metadata,
    encode_as_dictionary,
    replace_by_pipe,
]


@pytest.mark.parametrize("forge", FORGED, ids=lambda forge: forge.__name__)
def test_forged_index_is_refused(forge: Callable[[Path], None], shard: Path) -> None:
    forge(shard)
    with pytest.raises(DataError, match=r"00000\.tar"):
        ShardReader(shard.parent, shard.stem)


def test_footer_is_not_believed(shard: Path) -> None:
    """An Arrow reader follows the offsets of the footer, wherever they lead."""
    content = shard.read_bytes()
    footer_bytes = int.from_bytes(content[-10:-6], "little")
    shard.write_bytes(content[: -10 - footer_bytes] + b"\xff" * footer_bytes + content[-10:])
    read_shard(shard)


def test_link_is_followed_only_below_the_roots(shard: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for suffix in (".tar", ".arrow"):
        (other / f"a{suffix}").symlink_to(shard.with_suffix(suffix))
    with pytest.raises(DataError, match="leads to a file outside"):
        ShardReader(other, "a")
    assert len(ShardReader(other, "a", DataRoots.resolve(tmp_path))) == SAMPLES


ENTRY = '{"name":"%s","samples":%s,"bytes":%s,"sha256":"%s","index_bytes":1,"index_sha256":"%s"}'
HASH = "a" * 64
MANIFESTS = [
    pytest.param('{"shards":[],"version":2}', "version 2", id="another version"),
    pytest.param(ENTRY % ("../x", 1, 1, HASH, HASH), "another name", id="name in another folder"),
    pytest.param(ENTRY % ("..", 1, 1, HASH, HASH), "another name", id="name of the parent"),
    pytest.param(ENTRY % (r"x\u0000", 1, 1, HASH, HASH), "another name", id="name with NUL"),
    pytest.param(ENTRY % (r"x\n", 1, 1, HASH, HASH), "another name", id="name with a line break"),
    pytest.param(",".join([ENTRY % ("x", 1, 1, HASH, HASH)] * 2), "twice", id="name twice"),
    pytest.param(ENTRY % ("x", -1, 1, HASH, HASH), "impossible", id="negative samples"),
    pytest.param(ENTRY % ("x", 10**15, 2**60, HASH, HASH), "impossible", id="huge size"),
    pytest.param(ENTRY % ("x", 1, 1, HASH, "A" * 64), "impossible", id="hash in capitals"),
    pytest.param(ENTRY % ("x", 1, 1, HASH[1:], HASH), "impossible", id="short hash"),
    pytest.param("[" * 100_000, "contains no data set", id="nested too deeply"),
]


@pytest.mark.parametrize(("content", "message"), MANIFESTS)
def test_impossible_manifest_is_refused(content: str, message: str, tmp_path: Path) -> None:
    document = content if content.startswith('{"shards') else f'{{"shards":[{content}],"version":1}}'
    (tmp_path / "manifest.json").write_text(document)
    with pytest.raises(DataError, match=message):
        read_shard_manifest(tmp_path)


@pytest.mark.fuzz
@pytest.mark.parametrize("suffix", [".arrow", ".tar"])
def test_any_change_of_a_shard_is_read_or_refused(suffix: str, shard: Path) -> None:
    path = shard.with_suffix(suffix)
    content = path.read_bytes()
    for generator in draw_generators(200):
        path.write_bytes(mutate_bytes(content, generator))
        try:
            read_shard(shard)
        except DataError:
            continue
        except BaseException as error:
            error.add_note(f"repeat with SAILVL_FUZZ_SEED={generator.number}")  # type: ignore[attr-defined]
            raise
