"""Tests of the work units into which curation divides its partitions."""

from __future__ import annotations

from sailvl_trainer.curate.artifacts import WorkUnit, plan_units
from sailvl_trainer.curate.items import SourcePartition


def build_partition(source: str, samples: int = 0) -> SourcePartition:
    return SourcePartition(source=source, format="webdataset", path=b"", samples=samples)


def summarise(units: tuple[WorkUnit, ...]) -> list[tuple[int, int, int, int]]:
    return [(unit.partition, unit.first, unit.count, unit.first_item) for unit in units]


def test_limit_of_a_source_cuts_its_later_partitions() -> None:
    partitions = tuple(build_partition("source", samples=7) for _ in range(3))
    assert summarise(plan_units(partitions, [5, 5, 5])) == [(0, 0, 5, 0), (1, 0, 2, 5)]


def test_units_cover_every_item_once() -> None:
    partitions = tuple(build_partition(str(i)) for i in range(4))
    assert summarise(plan_units(partitions, [300, 0, 1, 128])) == [
        (0, 0, 128, 0),
        (0, 128, 128, 128),
        (0, 256, 44, 256),
        (2, 0, 1, 300),
        (3, 0, 128, 301),
    ]


def test_number_of_units_is_bounded_for_large_sources() -> None:
    units = plan_units((build_partition("source"),), [10**7])
    assert len(units) < 3000
    assert sum(unit.count for unit in units) == 10**7
