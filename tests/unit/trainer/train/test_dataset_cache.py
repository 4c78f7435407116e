"""Token counts of data counted by another tokenizer: one resumable pass of all ranks that reads no image."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sailvl_trainer.data.dataset import build_dataset, list_shards
from sailvl_trainer.data.encoder import SampleEncoder, TokenCounter
from sailvl_trainer.data.shards import ShardReader
from sailvl_trainer.errors import Preempted
from sailvl_trainer.rank import distributed_tasks
from sailvl_trainer.rank.context import Context
from sailvl_trainer.storage.lineage import claim_stage
from sailvl_trainer.train import dataset_cache
from tests.support.builders.training import build_set
from tests.support.dataset_cache import (
    SHARDS,
    count_some,
    list_cache,
    open_shards,
)


def test_shared_pass_gives_the_lengths_of_a_direct_count(
    context: Context, uncounted: Path, encoder: SampleEncoder, counted: list[str]
) -> None:
    dataset = open_shards(context, uncounted, encoder)
    assert counted == [f"{n:05d}" for n in range(SHARDS)]
    direct = build_dataset(list_shards([uncounted], "shards"), encoder)
    assert np.array_equal(dataset.lengths_S, direct.lengths_S)
    assert dataset.fingerprint == direct.fingerprint
    assert list_cache(context) == [f"shards-{dataset.fingerprint}.npy"], "the files of single shards are deleted"


def test_shards_counted_by_the_same_tokenizer_are_not_counted_again(
    context: Context, tmp_path: Path, encoder: SampleEncoder, counted: list[str]
) -> None:
    open_shards(context, build_set(tmp_path / "set"), encoder)
    assert counted == []


def test_later_start_maps_the_cache_and_opens_no_shard(
    context: Context, uncounted: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_shards(context, uncounted, encoder)
    monkeypatch.setattr(ShardReader, "__init__", lambda *_: pytest.fail("a shard was opened"))
    second = open_shards(context, uncounted, encoder)
    assert isinstance(second.lengths_S, np.memmap)
    assert np.array_equal(first.lengths_S, second.lengths_S)


def test_other_pack_length_is_measured_into_a_cache_of_its_own(
    context: Context, uncounted: Path, encoder: SampleEncoder
) -> None:
    datasets = [open_shards(context, uncounted, replace(encoder, pack_tokens=tokens)) for tokens in (256, 40)]
    assert [dataset.truncated_samples for dataset in datasets] == [0, len(datasets[1])]
    assert len(list_cache(context)) == 2


def test_counting_reads_no_image(
    context: Context, uncounted: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = spy_on_reads(monkeypatch)
    dataset = open_shards(context, uncounted, encoder)
    assert read == {"json": len(dataset)}


def spy_on_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the reads of the mapped tar by what is read: image or json."""
    read = Counter[str]()
    read_slice = ShardReader._slice

    def note_and_read(self: ShardReader, part: str, row: int) -> bytes:
        read[part] += 1
        return read_slice(self, part, row)

    monkeypatch.setattr(ShardReader, "_slice", note_and_read)
    return read


def test_heartbeats_continue_while_a_shard_is_counted(
    context: Context, uncounted: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed_tasks, "ACTIVITY_SECONDS", 0.0)
    events: list[str] = []
    count, update = TokenCounter.count, context.telemetry.update
    monkeypatch.setattr(
        TokenCounter, "count", lambda *args, **kwargs: (events.append("row"), count(*args, **kwargs))[1]
    )
    monkeypatch.setattr(context.telemetry, "update", lambda **changes: (events.append("beat"), update(**changes))[1])
    open_shards(context, uncounted, encoder)
    assert events.count("row") == SHARDS * 8
    assert "row row" not in " ".join(events)


def test_stop_request_is_obeyed_in_the_middle_of_a_shard(
    context: Context,
    tmp_path: Path,
    uncounted: Path,
    encoder: SampleEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed_tasks, "ACTIVITY_SECONDS", 0.0)
    count, rows = TokenCounter.count, []

    def request_stop_and_count(*args: Any, **kwargs: Any) -> tuple[int, int]:
        (tmp_path / "scratch" / "stop").touch()
        rows.append(1)
        return count(*args, **kwargs)

    monkeypatch.setattr(TokenCounter, "count", request_stop_and_count)
    with pytest.raises(Preempted):
        open_shards(context, uncounted, encoder)
    assert len(rows) == 1


def test_counting_time_is_recorded_as_starting_alone(context: Context, uncounted: Path, encoder: SampleEncoder) -> None:
    open_shards(context, uncounted, encoder)
    assert context.telemetry.progress.seconds.keys() == {"starting"}
    assert context.telemetry.progress.step == 0, "the operator would take counted samples for steps"


def test_start_after_a_killed_one_counts_only_the_remaining_shards(
    context: Context, uncounted: Path, encoder: SampleEncoder, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = count_some(context, uncounted, encoder, monkeypatch, shards=3)
    (folder.parent / f"{folder.name.removesuffix('-tokens')}.{'0' * 32}.tmp").touch()
    counted.clear()
    dataset = open_shards(context, uncounted, encoder)
    assert counted == ["00003", "00004"]
    assert len(list_cache(context)) == 1, "the temporary file of a killed start is deleted"
    assert np.array_equal(dataset.lengths_S, build_dataset(list_shards([uncounted], "shards"), encoder).lengths_S)


def test_superseded_attempt_deletes_no_file_of_a_later_one(
    context: Context, uncounted: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = count_some(context, uncounted, encoder, monkeypatch, shards=3)
    temporary = folder.parent / f"{folder.name.removesuffix('-tokens')}.{'0' * 32}.tmp"
    temporary.touch()
    claim_stage(context.files, context.stage.attempt + 1)
    open_shards(context, uncounted, encoder)
    assert temporary.exists()
    assert len(list(folder.iterdir())) == SHARDS


def test_superseded_attempt_whose_file_was_deleted_stops(
    context: Context, uncounted: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_file(*_: object, **__: object) -> None:
        claim_stage(context.files, context.stage.attempt + 1)
        raise FileNotFoundError("deleted by the later attempt")

    monkeypatch.setattr(dataset_cache, "write_lengths", lose_file)
    with pytest.raises(Preempted, match="superseded"):
        open_shards(context, uncounted, encoder)


def test_stop_request_is_obeyed_before_the_first_shard(
    context: Context, tmp_path: Path, uncounted: Path, encoder: SampleEncoder, counted: list[str]
) -> None:
    (tmp_path / "scratch" / "stop").touch()
    with pytest.raises(Preempted):
        open_shards(context, uncounted, encoder)
    assert counted == []
