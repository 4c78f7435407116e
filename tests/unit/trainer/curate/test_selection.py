"""Tests of the selection's files below a storage whose path has special characters."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailvl_trainer.contract import CurateConfig
from sailvl_trainer.curate.artifacts import CurationArtifacts, write_verified_items
from sailvl_trainer.curate.items import Item
from sailvl_trainer.curate.selection import select_samples
from sailvl_trainer.curate.stage import split_by_bytes
from sailvl_trainer.curate.statistics import compute_statistics
from sailvl_trainer.curate.verify import VerifiedItem
from sailvl_trainer.errors import ConfigError


def write_rows(root: Path, count: int) -> CurationArtifacts:
    """Write verified items below a root, as steps 1 to 3 of the stage do."""
    artifacts = CurationArtifacts(root / "run" / "curate" / "artifacts")
    items = [Item(source="s", key=f"{number}") for number in range(count)]
    rows = [
        VerifiedItem(outcome="ok", text="a cat", width=60, height=40, tiles=1, pixels_sha256=f"{number:064x}")
        for number in range(count)
    ]
    write_verified_items(artifacts.rows_file(0), 0, items, rows)
    return artifacts


@pytest.mark.parametrize("name", ["ro[x]ot", "ro*", "ro?ot", "item=5", "quote's", "back\\slash", "~", "[!a]"])
def test_path_of_the_storage_is_no_pattern(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "roxot", 7)
    artifacts = write_rows(tmp_path / name, 3)
    config = CurateConfig(sources=(), held_out_fraction=0.0)
    assert select_samples(artifacts, config) == {"kept": 3}
    assert compute_statistics(artifacts).items == 3


def test_error_advises_how_to_get_files_into_the_source_if_all_are_outside(tmp_path: Path) -> None:
    artifacts = CurationArtifacts(tmp_path / "artifacts")
    rows = [VerifiedItem(outcome="outside_source")]
    write_verified_items(artifacts.rows_file(0), 0, [Item(source="s", key="a")], rows)
    with pytest.raises(ConfigError, match=r"all images were dropped .*outside_source.*huggingface-cli download"):
        select_samples(artifacts, CurateConfig(sources=()))


PARTS = [
    pytest.param([], [], id="nothing"),
    pytest.param([1] * 7, [(0, 3), (3, 3), (6, 1)], id="limited by their number"),
    pytest.param([60, 40, 1, 99, 2], [(0, 2), (2, 2), (4, 1)], id="limited by their bytes"),
    pytest.param([500, 1, 500], [(0, 1), (1, 1), (2, 1)], id="larger than the limit"),
]


@pytest.mark.parametrize(("sizes", "parts"), PARTS)
def test_images_are_read_ahead_within_a_number_of_bytes(sizes: list[int], parts: list[tuple[int, int]]) -> None:
    assert list(split_by_bytes(sizes, max_count=3, max_bytes=100)) == parts
