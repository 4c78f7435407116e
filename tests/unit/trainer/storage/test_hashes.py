"""Tests of hashing files, whose sizes come from manifests that other runs wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailvl_trainer.storage import hashes
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError
from sailvl_trainer.storage.hashes import FileHash, HashedFile, describe_difference, hash_file


def test_size_that_would_take_years_to_read_is_invalid() -> None:
    assert FileHash(bytes=1 << 40, sha256="0" * 64).is_valid
    assert not FileHash(bytes=1 << 53, sha256="0" * 64).is_valid


def test_file_that_grows_while_it_is_hashed_is_read_to_its_expected_size_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "CHUNK_BYTES", 4)
    path, chunks = tmp_path / "a.tar", []
    path.write_bytes(b"12345678")

    def grow() -> None:
        chunks.append(1)
        if len(chunks) < 100:
            with path.open("ab") as file:
                file.write(b"1234")

    roots = DataRoots.resolve(tmp_path)
    file = HashedFile(path=path, expected=FileHash(bytes=8, sha256="0" * 64))
    assert describe_difference(file, roots, grow) == "larger than 8 bytes"
    assert len(chunks) == 2
    with pytest.raises(RefusedFileError, match="larger than 10 bytes"):
        hash_file(path, roots, max_bytes=10)
