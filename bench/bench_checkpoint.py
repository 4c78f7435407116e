"""Measure time and bytes of a checkpoint, beside torch's distributed checkpoint (DCP) and torch.save.

All write the same float32 weights and moments from one process, followed by a sync of the file system. Ours also writes
and checks a SHA-256 of every file, which the others don't. Prints a table, appends the figures to
bench/history.jsonl, and prints them last as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from bench import history
from sailvl_trainer.data.planner import DataPosition
from sailvl_trainer.rank.distributed import start_process_group
from sailvl_trainer.train import checkpoint
from sailvl_trainer.train.checkpoint_manifest import TrainingState
from sailvl_trainer.train.engine import STATE_KEYS, Fragment

MEGABYTES, ROUNDS = 480, 5
"""Defaults; only figures of runs with these are recorded in the history."""
STATE = TrainingState(step=1, data=DataPosition(seed=0, fingerprint="bench"))
Tensors = dict[str, dict[str, torch.Tensor]]
"""Tensors by parameter name, then by key: weight or moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFormat:
    """A way to save and load checkpoints."""

    name: str
    save: Callable[[Path, Tensors], None]
    load: Callable[[Path, Tensors], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=MEGABYTES, help="size of weights and moments")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds, of which the median counts")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    start_process_group(torch.device("cpu"))
    tensors = build_tensors(given.megabytes)
    seconds: dict[tuple[str, str], list[float]] = {(peer.name, what): [] for peer in PEERS for what in ("save", "load")}
    sizes: dict[str, int] = {}
    for _ in range(given.rounds):
        for peer in PEERS:
            took, sizes[peer.name] = measure(peer, tensors)
            for what, value in took.items():
                seconds[peer.name, what].append(value)
    figures = report({key: statistics.median(values) for key, values in seconds.items()}, sizes)
    if (given.megabytes, given.rounds) == (MEGABYTES, ROUNDS):
        history.append_record("checkpoint", figures)


def build_tensors(megabytes: int, width: int = 1024) -> Tensors:
    """Build square layers like those of a language model, of the given total size."""
    layers = max(1, megabytes * 2**20 // (len(STATE_KEYS) * 4 * width * width))
    return {f"layers.{i}.weight": {key: torch.randn(width, width) for key in STATE_KEYS} for i in range(layers)}


def measure(peer: CheckpointFormat, tensors: Tensors) -> tuple[dict[str, float], int]:
    """Return the seconds of a save and a load, and the bytes on disk.

    Raises AssertionError if the loaded tensors differ.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        started = time.perf_counter()
        peer.save(folder / "c", tensors)
        os.sync()
        saved = time.perf_counter()
        empty = {name: {key: torch.zeros_like(t) for key, t in keys.items()} for name, keys in tensors.items()}
        ready = time.perf_counter()
        peer.load(folder / "c", empty)
        loaded = time.perf_counter()
        assert all(torch.equal(empty[name][key], tensors[name][key]) for name in tensors for key in STATE_KEYS)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    finally:
        shutil.rmtree(folder)
    return {"save": saved - started, "load": loaded - ready}, size


def as_fragments(tensors: Tensors) -> Iterator[Fragment]:
    for name, keys in tensors.items():
        shape = tuple(keys["weight"].shape)
        yield Fragment(name=name, shape=shape, start=0, tensors={key: t.view(-1) for key, t in keys.items()})


def save_ours(folder: Path, tensors: Tensors) -> None:
    checkpoint.save_checkpoint(folder, as_fragments(tensors), digest="d", state=STATE)


def load_ours(folder: Path, tensors: Tensors) -> None:
    checkpoint.load_checkpoint(folder, "d", list(as_fragments(tensors)))


def save_dcp(folder: Path, tensors: Tensors) -> None:
    state_dict_saver.save(tensors, checkpoint_id=folder)


def load_dcp(folder: Path, tensors: Tensors) -> None:
    state_dict_loader.load(tensors, checkpoint_id=folder)


def save_torch(folder: Path, tensors: Tensors) -> None:
    folder.mkdir()
    torch.save(tensors, folder / "state.pt")


def load_torch(folder: Path, tensors: Tensors) -> None:
    for name, keys in torch.load(folder / "state.pt").items():
        for key, value in keys.items():
            tensors[name][key].copy_(value)


PEERS = (
    CheckpointFormat(name="ours", save=save_ours, load=load_ours),
    CheckpointFormat(name="DCP", save=save_dcp, load=load_dcp),
    CheckpointFormat(name="torch.save", save=save_torch, load=load_torch),
)


def report(seconds: dict[tuple[str, str], float], sizes: dict[str, int]) -> dict[str, float]:
    """Print the table and the figures, and return the figures."""
    print(f"{'':12}{'save s':>10}{'load s':>10}{'MB':>8}{'save/DCP':>12}{'load/DCP':>12}")
    ratios = {}
    for peer in PEERS:
        save, load = (seconds[peer.name, what] for what in ("save", "load"))
        ratios[peer.name] = round(save / seconds["DCP", "save"], 2), round(load / seconds["DCP", "load"], 2)
        row = f"{save:>10.2f}{load:>10.2f}{sizes[peer.name] / 1e6:>8.0f}"
        print(f"{peer.name:12}{row}{ratios[peer.name][0]:>12.2f}{ratios[peer.name][1]:>12.2f}")
    ours = ratios["ours"]
    figures = {"save_vs_dcp": ours[0], "load_vs_dcp": ours[1]}
    print(json.dumps({"bench": "checkpoint", **figures}))
    return figures


if __name__ == "__main__":
    main()
