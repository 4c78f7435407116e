"""Random changes of the documents on the storage: each is read, or set aside without any other error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from sailvl_trainer.contract import Checkpoint, Lineage, NonFinite, Result, ResultPointer, Skip
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import begin_attempt, claim_stage, lineage_path, non_finite_path, read_non_finite
from sailvl_trainer.storage.shard_manifest import ShardInfo, ShardManifest, read_shard_manifest
from tests.support.builders.worker import build_stage
from tests.support.fuzz import draw_generators, fuzz, mutate_bytes

pytestmark = pytest.mark.fuzz
DIGEST = "d" * 64
START = Checkpoint(step=10, path="demo/curate/checkpoints/attempt-0001/step-00000010")
SKIP = Skip(first=15, last=18, step=17, failures=2)
SHARD = ShardInfo(name="00000", samples=5, bytes=9, sha256="a" * 64, index_bytes=9, index_sha256="b" * 64)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def read_result(files: StageFiles, content: bytes) -> None:
    write(files.output / "result.json", content)
    files.find_result()


def read_pointer(files: StageFiles, content: bytes) -> None:
    write(files.storage / f"results/{DIGEST}.json", content)
    files.find_result()


def read_lineage(files: StageFiles, content: bytes) -> None:
    claim_stage(files, 2)
    write(lineage_path(files, 2), content)
    begin_attempt(files, 2)


def read_record(files: StageFiles, content: bytes) -> None:
    write(non_finite_path(files, 1), content)
    read_non_finite(files, 1)


def read_manifest(files: StageFiles, content: bytes) -> None:
    write(files.storage / "set/manifest.json", content)
    try:
        read_shard_manifest(files.storage / "set")
    except DataError:
        return


DOCUMENTS: list[tuple[Callable[[StageFiles, bytes], None], object]] = [
    (read_result, Result(stage="s", kind="curate", digest=DIGEST, attempt=1, output="demo/curate", metrics={"m": 1.5})),
    (read_pointer, ResultPointer(output="other/curate")),
    (read_lineage, Lineage(attempt=2, start=START, skips=(SKIP,))),
    (
        read_record,
        NonFinite(attempt=1, step=17, quantity="loss", value="nan", samples=(1,), max_resume_step=14, skips=(SKIP,)),
    ),
    (read_manifest, ShardManifest(shards=(SHARD,))),
]


@pytest.fixture
def files(tmp_path: Path) -> StageFiles:
    return StageFiles(build_stage(tmp_path))


@pytest.mark.parametrize(("read", "document"), DOCUMENTS, ids=lambda value: getattr(value, "__name__", ""))
def test_any_change_of_a_document_is_read_or_set_aside(
    read: Callable[[StageFiles, bytes], None], document: object, files: StageFiles
) -> None:
    content = encode(document)
    for generator in draw_generators(60):
        try:
            read(files, mutate_bytes(content, generator))
        except BaseException as error:
            error.add_note(f"repeat with SAILVL_FUZZ_SEED={generator.number}")  # type: ignore[attr-defined]
            raise


TEXT = st.text('ab"{}0\\\x1bλ', max_size=9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda children: st.lists(children) | st.dictionaries(TEXT, children),
)


@pytest.mark.parametrize("read", [read for read, _ in DOCUMENTS], ids=lambda read: read.__name__)
def test_any_json_or_bytes_is_read_or_set_aside(read: Callable[[StageFiles, bytes], None], files: StageFiles) -> None:
    fuzz(st.binary(max_size=200) | JSON.map(encode), lambda content: read(files, content), examples=30)
