"""Values that ranks exchange: what arrives is decoded into the expected type, bounded, and never unpickled."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sailvl_trainer.contract import Checkpoint, Lineage, Skip
from sailvl_trainer.errors import PeerLost
from sailvl_trainer.rank import collectives
from sailvl_trainer.rank.collectives import all_gather_values, broadcast_value
from sailvl_trainer.rank.distributed import start_process_group
from tests.support.pickle_attack import PickleAttack


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A value with the types that checkpoints exchange."""

    names: list[tuple[str, tuple[int, ...]]]


VALUES = [
    pytest.param(
        Lineage,
        Lineage(attempt=2, start=Checkpoint(step=3, path="a/b"), skips=(Skip(step=4, first=1, last=2, failures=1),)),
        id="lineage",
    ),
    pytest.param(list[str], [], id="empty list"),
    pytest.param(bool, False, id="bool"),
    pytest.param(str, "tasks/é", id="text"),
    pytest.param(set[str], {"a", "b"}, id="set"),
    pytest.param(dict[int, list[str]], {7: ["yes"], 9: []}, id="dict with numbers as keys"),
    pytest.param(Slice, Slice(names=[("weight", (2, 3))]), id="dataclass with tuples"),
]


@pytest.fixture(autouse=True)
def process_group() -> None:
    if not dist.is_initialized():
        start_process_group(torch.device("cpu"))


@pytest.mark.parametrize(("type_", "value"), VALUES)
def test_values_arrive_as_they_were_sent(type_: type[object], value: object) -> None:
    assert broadcast_value(type_, value) == value
    assert all_gather_values(type_, value) == [value]


def replace_received(monkeypatch: pytest.MonkeyPatch, size: int | None, data: bytes) -> None:
    """Have every all_gather return what a foreign process could send: a size, then data."""

    def all_gather(received: list[torch.Tensor], own: torch.Tensor) -> None:
        if own.dtype == torch.int64:
            received[0].fill_(len(data) if size is None else size)
        else:
            received[0].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    monkeypatch.setattr(collectives.dist, "all_gather", all_gather)


@pytest.mark.parametrize(
    ("size", "data"),
    [
        pytest.param(-1, b"", id="negative size"),
        pytest.param(1 << 60, b"", id="size of an exabyte"),
        pytest.param(None, b"\xff" * 9, id="no text"),
        pytest.param(None, b'{"a": 1}', id="other type"),
        pytest.param(None, b"[" * 200_000, id="nested too deeply"),
        pytest.param(None, pickle.dumps(["abcdef"]), id="pickle"),
    ],
)
def test_foreign_data_ends_the_rank_as_a_lost_peer(
    size: int | None, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_received(monkeypatch, size, data)
    with pytest.raises(PeerLost, match=r"^rank 0 .*NetworkPolicy"):
        all_gather_values(list[str], ["a"])


def test_own_value_that_is_too_long_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "MAX_VALUE_BYTES", 10)
    with pytest.raises(ValueError, match="value of 12 bytes is too long"):
        broadcast_value(str, "0123456789")


def test_torchs_object_collectives_run_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(pickle.UnpicklingError, match=r"sent posix\.system, but only plain values"):
        dist.all_gather_object([None], PickleAttack(marker))
    assert not marker.exists()


def test_torchs_object_collectives_still_exchange_plain_values() -> None:
    value = {"a": [1, 2.5, None, True], "b": ({"c"}, "é", b"x")}
    received: list[object] = [None]
    dist.all_gather_object(received, value)
    assert received == [value]


def test_all_object_collectives_of_torch_read_with_one_function() -> None:
    """If torch unpickled elsewhere in this module, the refusal above would miss it."""
    source = Path(distributed_c10d.__file__).read_text()
    assert source.count("_unpickler(") == 1
    assert "pickle.load" not in source
