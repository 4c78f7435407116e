"""Real ranks with an injected fault, forked from a process that has imported everything, so that they start at once.

A fault is a function of this module, called in the rank before its main; it patches one function.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from sailvl_trainer.contract import Env, Stage, Termination
from sailvl_trainer.curate import stage as curate
from sailvl_trainer.data.collate import Batch
from sailvl_trainer.data.loader import LoadedStep
from sailvl_trainer.data.shards import ShardReader, ShardWriter
from sailvl_trainer.data.token_counts import TokenCountFiles
from sailvl_trainer.evaluate import stage as evaluate
from sailvl_trainer.evaluate.answers import AnswerCache
from sailvl_trainer.model import export
from sailvl_trainer.rank.main import main as rank_main
from sailvl_trainer.rank.settings import Scratch
from sailvl_trainer.rank.store import STORE_VARIABLE, StoreAddress
from sailvl_trainer.rank.termination import ERROR_FILE_VARIABLE
from sailvl_trainer.storage import layout
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.shard_manifest import ShardInfo
from sailvl_trainer.train import checkpoint, dataset_cache, stage, trainer

LIMIT = 120
"""Longest time in seconds that ranks may take."""
LATE_IMPORTS = ["deepspeed", "duckdb", "transformers.models.internvl.modeling_internvl", "torch._dynamo"]
"""Modules that ranks import late, for the fork server; importing them in tests would take seconds."""
BALLAST, SIZE = "ballast", "64M"
EXT4_IOC_SHUTDOWN = 0x8004587D
"""<linux/ext4.h>"""
CLOSE_SECONDS = 5
"""Seconds in which the peers of a dead rank may exit by themselves."""
Fault = Callable[[], None]


class FaultyRanks:
    """The ranks of one attempt, without a worker; some of them with a fault."""

    def __init__(self, document: Stage, world_size: int = 2, faults: Sequence[Fault] = ()) -> None:
        """Start the ranks. `faults` has one fault per rank, or one for all ranks."""
        beside = Path(document.storage)  # a test may remove the storage itself
        self.folder = beside.with_name(f"{beside.name}-ranks") / f"{document.run}-{document.attempt}"
        self.folder.mkdir(parents=True)
        (self.folder / "stage.json").write_bytes(encode(document))
        store = StoreAddress(path=str(self.folder / "store"))
        place = {STORE_VARIABLE: encode(store).decode(), "WORLD_SIZE": str(world_size)}
        place |= {Env.STAGE_FILE: str(self.folder / "stage.json")}
        by_rank = list(faults) * (world_size if len(faults) == 1 else 1) or [do_nothing] * world_size
        self.processes = [self._start(rank, place, by_rank[rank]) for rank in range(world_size)]

    def _start(self, rank: int, place: dict[str, str], fault: Fault) -> ForkServerProcess:
        own = self.folder / f"rank-{rank}"
        Scratch(own).prepare()
        environment = place | {"RANK": str(rank), "LOCAL_RANK": str(rank), Env.SCRATCH: str(own)}
        process = _server().Process(target=_run_rank, args=(environment, own, fault))
        process.start()
        return process

    def wait_for_codes(self) -> list[int]:
        """Wait for all ranks and return their exit codes, -N for signal N.

        If a rank fails, its peers are terminated after a while, as the agent does.
        """
        sentinels = [process.sentinel for process in self.processes]
        connection.wait(sentinels, LIMIT)
        for process in self.processes:
            process.join(CLOSE_SECONDS if any(p.exitcode for p in self.processes) else LIMIT)
            process.terminate()
        for process in self.processes:
            process.join(LIMIT)
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, self.read_logs()
        return codes  # type: ignore[return-value]  # none is None

    def read_termination(self, rank: int = 0) -> Termination:
        """Return the termination of a rank that failed."""
        message: dict[str, str] = decode(dict[str, str], (self.folder / f"rank-{rank}" / "words").read_bytes())
        return decode(Termination, message["message"])

    def read_logs(self) -> str:
        """Return the end of the logs of all ranks."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("rank-*/log")))


class Volume:
    """A small volume: a tmpfs or, if `is_disk`, an ext4 file system that can fail and keeps what was synced to it."""

    def __init__(self, folder: Path, *, is_disk: bool) -> None:
        self.path, self._image = folder / "storage", folder / "image"
        self.path.mkdir()
        self._arguments = ["-t", "tmpfs", "-o", f"size={SIZE}", "none"]
        if is_disk:
            subprocess.run(["truncate", "-s", SIZE, self._image], check=True)
            subprocess.run(["mkfs.ext4", "-q", self._image], check=True)
            self._arguments = ["-o", "loop", str(self._image)]

    def mount(self) -> None:
        """Mount the volume. Raises CalledProcessError if this isn't allowed."""
        subprocess.run(["mount", *self._arguments, self.path], check=True, capture_output=True)

    def unmount(self) -> None:
        """Unmount the volume, if it is mounted."""
        subprocess.run(["umount", self.path], check=False, capture_output=True)


def provide_volume(folder: Path, *, is_disk: bool) -> Iterator[Volume]:
    """Yield a mounted volume and unmount it at the end; skip the test if mounting isn't allowed."""
    try:
        volume = Volume(folder, is_disk=is_disk)
        volume.mount()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no volume can be mounted here: {error}")
    yield volume
    volume.unmount()


@cache
def _server() -> ForkServerContext:
    """Start the fork server, once per test process; it finds its imports through the environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LATE_IMPORTS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("DS_ACCELERATOR", "cpu")
        forkserver.ensure_running()
    return context


def _run_rank(environment: dict[str, str], own: Path, fault: Fault) -> None:
    """Run a rank in the forked process."""
    log = os.open(own / "log", os.O_WRONLY | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(environment | {ERROR_FILE_VARIABLE: str(own / "words")})
    torch.set_num_threads(1)
    fault()
    rank_main()


def do_nothing() -> None:
    """Inject no fault."""


def kill_process() -> None:
    """Kill this process with SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def request_stop() -> None:
    """Create the stop file, as the worker does when SIGTERM arrives."""
    Scratch(Path(os.environ[Env.SCRATCH])).stop_file.touch()


def stop_process() -> None:
    """Stop this process until SIGCONT, as a debugger does or a machine that loses its network."""
    os.kill(os.getpid(), signal.SIGSTOP)


def raise_bug() -> None:
    """Raise the error of a bug."""
    raise ValueError("a plain mistake")


def fill_volume(volume: Path) -> None:
    """Fill the volume with other data."""
    with suppress(OSError), (volume / BALLAST).open("wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()


def shut_down_volume(volume: Path) -> None:
    """Make every access to the ext4 volume fail with EIO from now on, as a broken disk does."""
    folder = os.open(volume, os.O_RDONLY)
    fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", 1))
    os.close(folder)


def unmount_volume(volume: Path) -> None:
    """Detach the volume, so that its files are no longer found by their paths."""
    subprocess.run(["umount", "-l", volume], check=True)


def inject_at(point: str, do: Callable[[], None]) -> Fault:
    """Return a fault that calls a function at a point: one of POINTS, or `step N` for the end of that step."""
    assert point in POINTS or point.startswith("step "), point
    return partial(_inject, point, do)


def _inject(point: str, do: Callable[[], None]) -> None:
    if point.startswith("step "):
        _after(trainer.Trainer, "_record_step", do, lambda self, *_: self.state.step == int(point[5:]))
        return
    owner, name, number, is_before = POINTS[point]
    calls: list[int] = []

    def is_now(*_: Any) -> bool:
        calls.append(1)
        return len(calls) == number

    (_before if is_before else _after)(owner, name, do, is_now)


def _before(owner: Any, name: str, do: Callable[[], None], is_now: Callable[..., bool]) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **options: Any) -> Any:
        if is_now(*args):
            do()
        return original(*args, **options)

    setattr(owner, name, patched)


def _after(owner: Any, name: str, do: Callable[[], None], is_now: Callable[..., bool]) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        if is_now(*args):
            do()
        return result

    setattr(owner, name, patched)


POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "verifying the data": (stage, "prepare", 1, True),
    "measuring the data": (dataset_cache, "write_lengths", 1, True),
    "counting tokens": (TokenCountFiles, "count", 1, False),
    "starting": (stage, "build_engine", 1, True),
    "evaluating before": (stage.validation, "measure_validation_loss", 1, True),
    "saving, with half-written files": (checkpoint, "_write_fragments", 2, False),
    "saving, complete but before older ones are deleted": (trainer, "delete_old_checkpoints", 2, True),
    "evaluating after": (stage.validation, "measure_validation_loss", 2, True),
    "writing a shard": (ShardWriter, "write", 2, True),
    "writing the report of curation": (curate, "write_report", 1, True),
    "keeping answers": (AnswerCache, "add", 1, True),
    "writing the report of evaluation": (evaluate, "write_report", 1, True),
    "export begun": (stage, "_export", 1, True),
    "exporting": (export, "_write_processor", 1, True),
    "exported": (stage, "export_model", 1, False),
    "before the result": (layout.StageFiles, "write_result", 1, True),
    "before the result pointer": (layout, "write_document", 1, False),
}
"""Owner and name of the function at a point, number of the call, and whether the fault comes before or after it."""


def make_images_nan(*samples: int) -> None:
    """Replace the images of these samples by NaN, on the rank that has one of them."""
    original = trainer.Trainer.train_step

    def train_step(self: trainer.Trainer, step: LoadedStep) -> None:
        batches = [with_nan(batch) if set(batch.samples) & set(samples) else batch for batch in step.batches]
        original(self, replace(step, batches=batches))

    def with_nan(batch: Batch) -> Batch:
        return replace(batch, pixels_N3HW=torch.full_like(batch.pixels_N3HW, float("nan")))

    trainer.Trainer.train_step = train_step  # type: ignore[method-assign]


def log_counted(path: Path) -> None:
    """Append the name of each shard to a file once this rank has counted its tokens."""
    original = TokenCountFiles.count

    def count(self: TokenCountFiles, info: ShardInfo, reader: ShardReader, *args: Any) -> None:
        original(self, info, reader, *args)
        with path.open("a") as file:
            file.write(f"{reader.path.parent.name}/{info.name}\n")

    TokenCountFiles.count = count  # type: ignore[method-assign]


def ruin_weights(step: int) -> None:
    """Ruin the weights, which stay finite, in the update of a step, so that the next step's loss isn't finite."""
    original = trainer.Trainer.train_step

    def train(self: trainer.Trainer, loaded: Any) -> None:
        if self.state.step + 1 == step:
            schedule, self.schedule = self.schedule, lambda _: 1e30
            original(self, loaded)
            self.schedule = schedule
        else:
            original(self, loaded)

    trainer.Trainer.train_step = train  # type: ignore[method-assign]


def combine_faults(one: Fault, other: Fault) -> None:
    """Inject two faults."""
    one()
    other()


def next_attempt(document: Stage) -> Stage:
    """Return the stage config of the next attempt."""
    return replace(document, attempt=document.attempt + 1)
