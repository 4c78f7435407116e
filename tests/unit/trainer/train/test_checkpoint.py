"""Checkpoints: loaded into any partition, damage detected, old ones deleted along the lineage."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sailvl_trainer.contract import MANIFEST_FILE, Checkpoint, Lineage
from sailvl_trainer.data.planner import DataPosition
from sailvl_trainer.errors import ConfigError, DataError, StorageError, TrainerError
from sailvl_trainer.rank.distributed import start_process_group
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.files import write_atomic
from sailvl_trainer.storage.hashes import hash_file
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import begin_attempt
from sailvl_trainer.train import checkpoint
from sailvl_trainer.train.checkpoint import delete_old_checkpoints, load_checkpoint, save_checkpoint
from sailvl_trainer.train.checkpoint_manifest import TrainingState, is_usable_checkpoint, read_checkpoint_manifest
from sailvl_trainer.train.engine import STATE_KEYS, Fragment
from tests.support.builders.training import build_stage
from tests.support.fuzz import draw_generators, mutate_bytes
from tests.support.read_failures import PASSING_ERRNOS, fail_calls, format_errno

STATE = TrainingState(step=7, tokens=70, samples=17, loss=1.5, data=DataPosition(seed=1, fingerprint="f", cursor=3))
SHAPES = {"a.weight": (3, 4), "a.bias": (5,)}


@pytest.fixture(autouse=True)
def group() -> None:
    if not dist.is_initialized():
        start_process_group(torch.device("cpu"))


def build_fragments(cuts: int, fill: float | None = None) -> list[Fragment]:
    """Split each parameter into `cuts` slices at random offsets; values count upwards, or are all `fill`."""
    fragments = []
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        edges = sorted(random.Random(cuts).sample(range(1, numel), cuts - 1))
        for start, end in zip([0, *edges], [*edges, numel], strict=True):
            whole = {key: torch.arange(numel, dtype=torch.float32) + 100 * i for i, key in enumerate(STATE_KEYS)}
            tensors = {
                key: t[start:end].clone() if fill is None else torch.full((end - start,), fill)
                for key, t in whole.items()
            }
            fragments.append(Fragment(name=name, shape=shape, start=start, tensors=tensors))
    return fragments


def write(folder: Path, fragments: list[Fragment]) -> None:
    save_checkpoint(folder, fragments, digest="d", state=STATE)


@pytest.mark.parametrize("cuts", [1, 2, 4])
def test_checkpoint_is_loaded_into_any_partition(cuts: int, tmp_path: Path) -> None:
    write(tmp_path / "c", build_fragments(1))
    fragments = build_fragments(cuts, fill=-1.0)
    assert load_checkpoint(tmp_path / "c", "d", fragments) == STATE
    for found, expected in zip(fragments, build_fragments(cuts), strict=True):
        assert all(torch.equal(found.tensors[key], expected.tensors[key]) for key in STATE_KEYS)


def test_gap_between_slices_fails_before_the_manifest(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"a\.weight"):
        write(tmp_path / "c", build_fragments(1)[1:] + build_fragments(2)[1:2])
    assert not (tmp_path / "c" / MANIFEST_FILE).exists()


def test_files_of_a_killed_save_are_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "rank-00007.safetensors").write_bytes(b"half")
    write(folder, build_fragments(1))
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST_FILE, "rank-00000.safetensors"]


def test_changed_trainable_parameters_raise_config_error(tmp_path: Path) -> None:
    write(tmp_path / "c", build_fragments(1))
    with pytest.raises(ConfigError, match=r"frozen in this stage: \['a\.bias'\]"):
        load_checkpoint(tmp_path / "c", "d", build_fragments(1)[:1])
    other = replace(build_fragments(1)[0], shape=(12,))
    with pytest.raises(ConfigError, match=r"no a\.weight of shape \(12,\)"):
        load_checkpoint(tmp_path / "c", "d", [other])


def change_manifest(folder: Path, **changes: object) -> None:
    document = json.loads((folder / MANIFEST_FILE).read_bytes())
    (folder / MANIFEST_FILE).write_text(json.dumps(document | changes))


def change_state(folder: Path, **changes: object) -> None:
    change_manifest(folder, state=json.loads((folder / MANIFEST_FILE).read_bytes())["state"] | changes)


def change_file(folder: Path, file: str) -> None:
    change_manifest(folder, files={file: {"bytes": 1, "sha256": "a" * 64}})


def change_slice(folder: Path, **changes: object) -> None:
    parameters = json.loads((folder / MANIFEST_FILE).read_bytes())["parameters"]
    parameters["a.bias"]["slices"][0] |= changes
    change_manifest(folder, parameters=parameters)


def exchange_tensors(folder: Path) -> None:
    """Write tensors of other sizes, with a manifest that has their hash."""
    path = folder / "rank-00000.safetensors"
    save_file({f"{key}:{name}": torch.zeros(1) for key in STATE_KEYS for name in SHAPES}, path)
    found = hash_file(path, DataRoots.resolve(folder))
    change_manifest(folder, files={path.name: {"bytes": found.bytes, "sha256": found.sha256}})


def replace_by_pipe(folder: Path) -> None:
    (folder / "rank-00000.safetensors").unlink()
    os.mkfifo(folder / "rank-00000.safetensors")


DAMAGES = [
    pytest.param(lambda f: (f / MANIFEST_FILE).unlink(), DataError, "No such file", id="no manifest"),
    pytest.param(lambda f: (f / MANIFEST_FILE).write_bytes(b"{"), DataError, "truncated", id="truncated manifest"),
    pytest.param(lambda f: change_manifest(f, format=2), DataError, "its format is 2", id="another format"),
    pytest.param(lambda f: change_state(f, step=-1), DataError, "impossible number of steps", id="negative step"),
    pytest.param(lambda f: change_file(f, file="../x"), DataError, "impossible name", id="file in another folder"),
    pytest.param(lambda f: change_slice(f, start=1), DataError, "leave a gap", id="gap"),
    pytest.param(lambda f: change_slice(f, numel=-1), DataError, "leave a gap", id="negative slice"),
    pytest.param(lambda f: change_slice(f, file="x"), DataError, "in no file", id="slice in an unlisted file"),
    pytest.param(exchange_tensors, DataError, "has shape", id="tensors of other sizes"),
    pytest.param(replace_by_pipe, DataError, "rank-00000", id="pipe"),
    pytest.param(lambda f: (f / "rank-00000.safetensors").unlink(), DataError, "rank-00000", id="missing file"),
    pytest.param(lambda f: os.truncate(f / "rank-00000.safetensors", 99), DataError, "has 99 bytes", id="truncated"),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES)
def test_damaged_checkpoint_raises_data_error(
    damage: object, error: type[TrainerError], message: str, tmp_path: Path
) -> None:
    write(tmp_path, build_fragments(1))
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(error, match=message):
        load_checkpoint(tmp_path, "d", build_fragments(1))


def test_failed_load_fills_nothing(tmp_path: Path) -> None:
    """Otherwise a stage that then starts from its beginning would have weights of the damaged checkpoint."""
    write(tmp_path, build_fragments(1))
    exchange_tensors(tmp_path)
    fragments = build_fragments(2, fill=-1.0)
    with pytest.raises(DataError):
        load_checkpoint(tmp_path, "d", fragments)
    assert all((tensor == -1.0).all() for fragment in fragments for tensor in fragment.tensors.values())


def test_unusable_checkpoint_is_set_aside_and_an_earlier_one_is_chosen(tmp_path: Path) -> None:
    files = StageFiles(build_stage(tmp_path))
    begin_attempt(files, 1)
    for step in (3, 6, 9):
        write(files.checkpoint_dir(1, step), build_fragments(1))
    (files.checkpoint_dir(1, 9) / MANIFEST_FILE).write_bytes(b"")
    os.truncate(files.checkpoint_dir(1, 6) / "rank-00000.safetensors", 99)
    start = begin_attempt(files, 2, is_usable=partial(is_usable_checkpoint, files, "d")).start
    assert start is not None
    assert start.step == 3
    assert [saved.step for saved in files.list_checkpoints(1)] == [3]
    assert len(list(files.checkpoint_dir(1, 9).glob("manifest.json.unusable-*"))) == 1


@pytest.mark.parametrize("number", PASSING_ERRNOS, ids=format_errno)
@pytest.mark.parametrize(("call", "name"), [("open", MANIFEST_FILE), ("stat", "rank-00000.safetensors")])
def test_checkpoint_that_cannot_be_read_is_not_given_up(
    call: str, name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StageFiles(build_stage(tmp_path))
    begin_attempt(files, 1)
    write(files.checkpoint_dir(1, 9), build_fragments(1))
    with monkeypatch.context() as patch:
        fail_calls(patch, call, name, number)
        with pytest.raises(StorageError):
            begin_attempt(files, 2, is_usable=partial(is_usable_checkpoint, files, "d"))
        with pytest.raises(StorageError):
            load_checkpoint(files.checkpoint_dir(1, 9), "d", build_fragments(1))
    assert [saved.step for saved in files.list_checkpoints(1)] == [9]


def test_checkpoint_is_not_damaged_if_safetensors_cannot_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors raises FileNotFoundError whenever it can't open a file, for example with too many open ones."""

    def fail(*_: object) -> None:
        raise FileNotFoundError("No such file or directory: x")

    write(tmp_path, build_fragments(1))
    monkeypatch.setattr(checkpoint, "safe_open", fail)
    with pytest.raises(StorageError, match="rank-00000"):
        load_checkpoint(tmp_path, "d", build_fragments(1))


@pytest.mark.fuzz
@pytest.mark.parametrize("name", [MANIFEST_FILE, "rank-00000.safetensors"])
def test_any_change_of_a_checkpoint_is_loaded_or_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, build_fragments(1))
    content = (tmp_path / name).read_bytes()
    for generator in draw_generators(100):
        (tmp_path / name).write_bytes(mutate_bytes(content, generator))
        if name != MANIFEST_FILE:  # a manifest that was forged with the file
            found = hash_file(tmp_path / name, DataRoots.resolve(tmp_path))
            change_manifest(tmp_path, files={name: {"bytes": found.bytes, "sha256": found.sha256}})
        try:
            load_checkpoint(tmp_path, "d", build_fragments(2))
        except TrainerError:
            continue
        except BaseException as error:
            error.add_note(f"repeat with SAILVL_FUZZ_SEED={generator.number}")  # type: ignore[attr-defined]
            raise


def test_flipped_bit_raises_data_error(tmp_path: Path) -> None:
    write(tmp_path, build_fragments(1))
    path = tmp_path / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="with SHA-256"):
        load_checkpoint(tmp_path, "d", build_fragments(1))


def test_checkpoint_of_another_stage_raises_data_error(tmp_path: Path) -> None:
    write(tmp_path, build_fragments(1))
    with pytest.raises(DataError, match="has stage digest d, expected other"):
        read_checkpoint_manifest(tmp_path, "other")


# attempt → (step of its start, of attempt, its whole checkpoints, its torn ones)
HISTORIES = [
    pytest.param({1: (None, [3, 6, 9], [])}, 1, 2, {(1, 6), (1, 9)}, id="newest two are kept"),
    pytest.param(
        {1: (None, [3, 6], []), 2: ((1, 6), [9], [])}, 2, 2, {(1, 6), (2, 9)}, id="earlier attempts of the lineage"
    ),
    pytest.param(
        {1: (None, [3, 6, 9], []), 2: ((1, 3), [6], [])},
        2,
        2,
        {(1, 3), (2, 6)},
        id="checkpoints off the lineage are deleted",
    ),
    pytest.param(
        {1: (None, [3], [6]), 2: ((1, 3), [6, 9], [5])}, 2, 2, {(2, 6), (2, 9)}, id="incomplete checkpoints are deleted"
    ),
    pytest.param(
        {1: (None, [3], []), 2: ((1, 3), [6], []), 3: ((1, 3), [9], [])}, 2, 1, {(1, 3), (2, 6), (3, 9)}, id="truncated"
    ),
    pytest.param({1: (None, [3], []), 2: (None, [6], [])}, 2, 0, {(2, 6)}, id="at least one is kept"),
]


@pytest.mark.parametrize(("history", "attempt", "keep", "left"), HISTORIES)
def test_delete_old_checkpoints_keeps_the_newest_of_the_lineage(
    history: dict[int, tuple[tuple[int, int] | None, list[int], list[int]]],
    attempt: int,
    keep: int,
    left: set[tuple[int, int]],
    tmp_path: Path,
) -> None:
    files = StageFiles(build_stage(tmp_path))
    for number, (start, whole, torn) in history.items():
        begun = (
            None if start is None else Checkpoint(step=start[1], path=files.relative_path(files.checkpoint_dir(*start)))
        )
        write_atomic(files.attempts / f"{number}.json", encode(Lineage(attempt=number, start=begun)))
        for step in whole + torn:
            files.checkpoint_dir(number, step).mkdir(parents=True)
        for step in whole:
            (files.checkpoint_dir(number, step) / MANIFEST_FILE).touch()
    delete_old_checkpoints(files, attempt, keep)
    found = {(a, s) for a in history for s in range(20) if files.checkpoint_dir(a, s).exists()}
    assert found == left
