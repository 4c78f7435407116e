"""The manifest of an export: it lists every file, and one that can't be used is a DataError that names the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.export_manifest import list_export_files
from sailvl_trainer.storage.hashes import describe_difference
from tests.support.builders.evaluation import export_untrained


def test_every_file_of_an_export_is_listed_with_its_hash(tmp_path: Path) -> None:
    folder = export_untrained(tmp_path) / "model/export"
    files = list_export_files(folder, tmp_path)
    assert {file.path for file in files} == set(folder.iterdir()) - {folder / "manifest.json"}
    assert {file.path.name for file in files} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert {describe_difference(file, DataRoots.resolve(folder)) for file in files} == {""}


FILE = '{"bytes":1,"sha256":"%s"}' % ("a" * 64)
MANIFESTS = [
    pytest.param(None, id="missing"),
    pytest.param("", id="empty"),
    pytest.param("[]", id="another type"),
    pytest.param('{"schema_version":9,"files":{}}', id="another version"),
    pytest.param('{"files":{"../x":' + FILE + "}}", id="file in another folder"),
    pytest.param('{"files":{"x":{"bytes":-1,"sha256":"%s"}}}' % ("a" * 64), id="negative size"),
    pytest.param('{"files":' * 50_000, id="nested too deeply"),
    pytest.param('{"files":{}}', id="no files"),
    pytest.param('{"files":{"config.json":' + FILE + "}}", id="no weights"),
    pytest.param('{"files":{"model.safetensors":' + FILE + "}}", id="no config"),
]


@pytest.mark.parametrize("content", MANIFESTS)
def test_unusable_manifest_is_a_data_error(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=rf"export {tmp_path} has no usable manifest\.json"):
        list_export_files(tmp_path, tmp_path)


def write_manifest(folder: Path) -> None:
    names = ("config.json", "model.safetensors")
    files = ",".join(f'"{name}":{FILE}' for name in names)
    (folder / "manifest.json").write_text('{"files":{' + files + "}}")


UNLISTED = ["adapter_config.json", "model.safetensors.index.json", "added_tokens.json", "additional_chat_templates/"]


@pytest.mark.parametrize("name", UNLISTED)
def test_file_that_the_manifest_does_not_list_is_a_data_error(name: str, tmp_path: Path) -> None:
    """Transformers would load it together with the verified files."""
    write_manifest(tmp_path)
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=rf"has '{name.rstrip('/')}', which its manifest\.json doesn't list; remove it"):
        list_export_files(tmp_path, tmp_path)


def test_hidden_files_of_a_network_file_system_are_allowed(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    (tmp_path / ".nfs0000000001").touch()
    assert len(list_export_files(tmp_path, tmp_path)) == 2
