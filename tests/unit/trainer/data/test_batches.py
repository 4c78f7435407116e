"""From shards to batches: lengths, labels, packs without leakage, images, skipped steps, validation batches."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sailvl_trainer.contract import ModelConfig, Skip
from sailvl_trainer.data.chat import IGNORE_INDEX
from sailvl_trainer.data.collate import Batch, collate
from sailvl_trainer.data.dataset import ShardDataset, build_dataset, list_shards
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.data.loader import LoadedStep, load_steps, load_validation_batches, sample_subset
from sailvl_trainer.data.planner import Planner, build_planner
from sailvl_trainer.data.samples import Message, Sample
from sailvl_trainer.data.shards import ShardReader, ShardWriter
from sailvl_trainer.data.synthetic import draw_question
from sailvl_trainer.demo.build_data import make_questions
from sailvl_trainer.errors import ConfigError, DataError
from sailvl_trainer.model.build import build_model
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import IMAGE_CONTEXT, load_tokenizer
from sailvl_trainer.storage.shard_manifest import write_shard_manifest
from sailvl_trainer.train.forward import PackedModel

TINY = ModelConfig(preset="tiny")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("set")
    make_questions(directory, level=2, number=60)
    return directory


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    return SampleEncoder(tokenizer=load_tokenizer(TINY), preset=get_preset("tiny"), max_tiles=1, pack_tokens=512)


@pytest.fixture(scope="module")
def dataset(prepared: Path, encoder: SampleEncoder) -> ShardDataset:
    return build_dataset(list_shards([prepared], "shards"), encoder)


@pytest.fixture(scope="module")
def planner(dataset: ShardDataset) -> Planner:
    return build_planner(dataset, pack_tokens=512, pack_tiles=16, packs_per_step=4)


def write_set(directory: Path, samples: list[Sample]) -> Path:
    with ShardWriter(directory / "shards", "00000") as writer:
        for sample in samples:
            writer.write(sample)
    assert writer.info is not None
    write_shard_manifest(directory / "shards", [writer.info])
    return directory


@pytest.mark.slow
def test_hidden_states_of_pack_equal_those_of_single_samples(dataset: ShardDataset, encoder: SampleEncoder) -> None:
    model = PackedModel(build_model(TINY, encoder.tokenizer, seed=1)).eval()
    pack = tuple(range(5))

    def hidden(samples: tuple[int, ...]) -> torch.Tensor:
        batch = collate(dataset, encoder, samples)
        with torch.no_grad():
            return model.encode(batch.input_ids_1T, batch.position_ids_1T, batch.pixels_N3HW)

    together, at = hidden(pack), 0
    for sample in pack:
        length = int(dataset.lengths_S["tokens"][sample])
        alone = hidden((sample,))[:length]
        torch.testing.assert_close(together[at : at + length], alone, atol=1e-5, rtol=1e-4)
        at += length


def test_labels_do_not_cross_sample_boundaries(dataset: ShardDataset, encoder: SampleEncoder) -> None:
    batch = collate(dataset, encoder, tuple(range(5)))
    ends = np.cumsum(dataset.lengths_S["tokens"][:5]) - 1
    assert (batch.labels_1T[0][torch.from_numpy(ends)] == IGNORE_INDEX).all()
    starts = torch.from_numpy(np.r_[0, ends + 1])
    assert (batch.position_ids_1T[0][starts] == 0).all()
    assert int((batch.position_ids_1T[0] == 0).sum()) == 6  # five samples, and padding as the sixth


def test_labels_are_shifted_by_one(dataset: ShardDataset, encoder: SampleEncoder) -> None:
    batch = collate(dataset, encoder, tuple(range(5)))
    at = torch.nonzero(batch.labels_1T[0] != IGNORE_INDEX)[:, 0]
    assert torch.equal(batch.labels_1T[0][at], batch.input_ids_1T[0][at + 1])
    assert batch.loss_tokens == len(at) > 0


def test_each_tile_has_its_image_tokens(dataset: ShardDataset, encoder: SampleEncoder) -> None:
    batch = collate(dataset, encoder, tuple(range(5)))
    context = encoder.tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    assert int((batch.input_ids_1T == context).sum()) == 16 * len(batch.pixels_N3HW)
    assert batch.tiles == len(batch.pixels_N3HW) == 5


def test_pack_without_images_has_one_black_tile(dataset: ShardDataset, encoder: SampleEncoder) -> None:
    empty = collate(dataset, encoder, ())
    assert empty.pixels_N3HW.shape == (1, 3, 112, 112)
    assert (empty.loss_tokens, empty.tokens, empty.tiles) == (0, 0, 0)


def test_text_only_sample_is_collated(tmp_path: Path, encoder: SampleEncoder) -> None:
    turns = (Message(role="user", content="What is red and blue?"), Message(role="assistant", content="purple"))
    write_set(tmp_path, [Sample(key="a", image=None, suffix="", messages=turns)])
    batch = collate(build_dataset(list_shards([tmp_path], "shards"), encoder), encoder, (0,))
    assert (batch.tiles, len(batch.pixels_N3HW)) == (0, 1)
    assert batch.loss_tokens > 0


def build_long(text_before: int, text_after: int) -> Sample:
    question = "red " * text_before + "<image>\n" + "blue " * text_after
    turns = (Message(role="user", content=question), Message(role="assistant", content="green"))
    return replace(draw_question(0, 0, 1), messages=turns)


@pytest.mark.parametrize(("before", "after"), [(0, 900), (900, 0), (500, 500), (498, 0)])
def test_long_sample_is_truncated_but_keeps_its_image(
    tmp_path: Path, encoder: SampleEncoder, before: int, after: int
) -> None:
    write_set(tmp_path, [build_long(before, after), draw_question(0, 1, 1)])
    dataset = build_dataset(list_shards([tmp_path], "shards"), encoder)
    context = encoder.tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    assert dataset.truncated_samples == 1
    batch = collate(dataset, encoder, (0,))
    assert batch.tokens == encoder.pack_tokens
    assert int((batch.input_ids_1T == context).sum()) == 16


def test_sample_of_exactly_pack_tokens_is_not_truncated(tmp_path: Path, encoder: SampleEncoder) -> None:
    write_set(tmp_path, [draw_question(0, 1, 1)])
    length = build_dataset(list_shards([tmp_path], "shards"), encoder).tokens
    assert build_dataset(list_shards([tmp_path], "shards"), replace(encoder, pack_tokens=length)).truncated_samples == 0
    assert (
        build_dataset(list_shards([tmp_path], "shards"), replace(encoder, pack_tokens=length - 1)).truncated_samples
        == 1
    )


def test_pack_tokens_below_two_tiles_raise_config_error(encoder: SampleEncoder) -> None:
    with pytest.raises(ConfigError, match=r"packTokens is 16.* at least 32"):
        replace(encoder, pack_tokens=16)


def test_pack_tiles_below_largest_image_raise_config_error(tmp_path: Path, encoder: SampleEncoder) -> None:
    write_set(tmp_path, [draw_question(0, 1, 1)])
    dataset = build_dataset(list_shards([tmp_path], "shards"), encoder)
    with pytest.raises(ConfigError, match="packTiles is 0"):
        build_planner(dataset, pack_tokens=512, pack_tiles=0, packs_per_step=1)


BROKEN = [
    pytest.param(
        {"messages": (Message(role="user", content="no placeholder"),)},
        "no <image> in a user turn",
        id="placeholder missing",
    ),
    pytest.param(
        {"messages": (Message(role="user", content="<image><image>"),)}, "2 <image> placeholders", id="two placeholders"
    ),
    pytest.param({"image": b"broken"}, "invalid image", id="invalid image"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_broken_record_raises_data_error_naming_shard_and_record(
    tmp_path: Path, encoder: SampleEncoder, change: dict[str, object], message: str
) -> None:
    with ShardWriter(tmp_path / "shards", "00007") as writer:
        writer.write(draw_question(0, 0, 1))
        writer.write(replace(draw_question(0, 1, 1), key="bad", **change), (112, 112))  # type: ignore[arg-type]
    assert writer.info is not None
    write_shard_manifest(tmp_path / "shards", [writer.info])

    def load() -> None:
        dataset = build_dataset(list_shards([tmp_path], "shards"), encoder)
        planner = build_planner(dataset, pack_tokens=512, pack_tiles=16, packs_per_step=4)
        next(load_steps(planner, dataset, encoder, planner.first_position(0), rank=0, world_size=1))

    with pytest.raises(DataError, match=rf"00007.tar, record 1 \(bad\): .*{message}"):
        load()


def test_collate_reads_each_image_once(
    dataset: ShardDataset, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int]] = []
    read_slice = ShardReader._slice

    def note_and_read(self: ShardReader, part: str, row: int) -> bytes:
        if threading.current_thread() is threading.main_thread():  # loaders of other tests may still be decoding
            read.append((part, row))
        return read_slice(self, part, row)

    monkeypatch.setattr(ShardReader, "_slice", note_and_read)
    collate(dataset, encoder, (4, 2, 7))
    assert Counter(read) == {(part, row): 1 for part in ("image", "json") for row in (4, 2, 7)}


def test_stored_and_new_token_counts_give_equal_lengths(
    tmp_path: Path, dataset: ShardDataset, encoder: SampleEncoder
) -> None:
    samples = [dataset.locate(sample)[0].sample(dataset.locate(sample)[1]) for sample in range(len(dataset))]
    assert dataset.locate(0)[0].counted_by is not None
    uncounted = build_dataset(list_shards([write_set(tmp_path, samples)], "shards"), encoder)
    assert uncounted.locate(0)[0].counted_by is None
    assert np.array_equal(uncounted.lengths_S, dataset.lengths_S)


def test_fingerprint_depends_on_data_and_pack_length(
    prepared: Path, dataset: ShardDataset, encoder: SampleEncoder
) -> None:
    shorter = build_dataset(list_shards([prepared], "shards"), replace(encoder, pack_tokens=256))
    twice = build_dataset(list_shards([prepared, prepared], "shards"), encoder)
    assert len({dataset.fingerprint, shorter.fingerprint, twice.fingerprint}) == 3
    assert len(twice) == 2 * len(dataset)
    assert twice.locate(len(dataset))[1] == 0


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_sample_is_loaded_once_per_epoch_over_all_ranks(
    dataset: ShardDataset, encoder: SampleEncoder, planner: Planner, world_size: int
) -> None:
    steps, _ = planner.count_steps(seed=0)
    seen = Counter[int]()
    for rank in range(world_size):
        loaded = load_steps(planner, dataset, encoder, planner.first_position(0), rank=rank, world_size=world_size)
        for step in islice(loaded, steps):
            assert len(step.batches) == -(-4 // world_size) or step.next_position.epoch == 1
            seen.update(s for batch in step.batches for s in batch.samples)
    assert seen == Counter(range(len(dataset)))


def test_resumed_loader_yields_the_same_batches(
    dataset: ShardDataset, encoder: SampleEncoder, planner: Planner
) -> None:
    def load(state: object, number: int) -> list[Batch]:
        loaded = load_steps(planner, dataset, encoder, state, rank=0, world_size=1)  # type: ignore[arg-type]
        return [batch for step in islice(loaded, number) for batch in step.batches]

    first = next(load_steps(planner, dataset, encoder, planner.first_position(0), rank=0, world_size=1))
    whole, rest = load(planner.first_position(0), 3), load(first.next_position, 2)
    for one, other in zip(whole[len(first.batches) :], rest, strict=True):
        assert one.samples == other.samples
        assert torch.equal(one.input_ids_1T, other.input_ids_1T)
        assert torch.equal(one.pixels_N3HW, other.pixels_N3HW)


def test_skipped_steps_are_planned_but_not_read(
    dataset: ShardDataset, encoder: SampleEncoder, planner: Planner
) -> None:
    state, skips = planner.first_position(0), (Skip(first=4, last=5, step=4, failures=2),)

    def load(**options: Any) -> list[LoadedStep]:
        return list(islice(load_steps(planner, dataset, encoder, state, rank=0, world_size=1, **options), 4))

    plain, skipped = load(), load(first_step=3, skips=skips)
    assert [step.is_skipped for step in skipped] == [False, True, True, False]
    assert [len(step.batches) for step in skipped[1:3]] == [0, 0]
    for one, other in zip(plain, skipped, strict=True):
        assert (one.samples, one.tokens, one.next_position) == (other.samples, other.tokens, other.next_position)


def held_out(dataset: ShardDataset, encoder: SampleEncoder, **changes: object) -> list[Batch]:
    options: dict[str, object] = {"samples": 30, "pack_tiles": 16, "rank": 0, "world_size": 1, "shuffle_images": False}
    return list(load_validation_batches(dataset, encoder, **(options | changes)))  # type: ignore[arg-type]


def test_shuffled_images_keep_all_lengths(dataset: ShardDataset, encoder: SampleEncoder) -> None:
    plain, shuffled = held_out(dataset, encoder), held_out(dataset, encoder, shuffle_images=True)
    for one, other in zip(plain, shuffled, strict=True):
        assert torch.equal(one.input_ids_1T, other.input_ids_1T)
        assert one.pixels_N3HW.shape == other.pixels_N3HW.shape
        differ = (one.pixels_N3HW != other.pixels_N3HW).flatten(1).any(1)
        assert differ.all()
    tiles = [sorted(t.sum().item() for b in batches for t in b.pixels_N3HW) for batches in (plain, shuffled)]
    assert tiles[0] == pytest.approx(tiles[1])


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_each_validation_sample_is_loaded_once_over_all_ranks(
    dataset: ShardDataset, encoder: SampleEncoder, world_size: int
) -> None:
    ranks = [held_out(dataset, encoder, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = sorted(s for batches in ranks for batch in batches for s in batch.samples)
    assert seen == sample_subset(len(dataset), 30).tolist()


def test_shuffled_images_are_tiled_by_the_grid_of_their_sample(tmp_path: Path) -> None:
    tall = SampleEncoder(tokenizer=load_tokenizer(TINY), preset=get_preset("tiny"), max_tiles=4, pack_tokens=512)
    samples = [draw_question(0, i, 1) for i in range(4)]
    with ShardWriter(tmp_path / "shards", "00000") as writer:
        for i, sample in enumerate(samples):
            writer.write(sample, (112, 112) if i % 2 else (112, 224))
    assert writer.info is not None
    write_shard_manifest(tmp_path / "shards", [writer.info])
    dataset = build_dataset(list_shards([tmp_path], "shards"), tall)
    assert sorted(dataset.lengths_S["tiles"].tolist()) == [1, 1, 3, 3]
    for batch in held_out(dataset, tall, shuffle_images=True):
        assert len(batch.pixels_N3HW) == batch.tiles
