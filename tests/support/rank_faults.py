"""Ranks that meet a fault, for tests: whole ones, forked from a process that has imported all: they start at once.

A fault is a function of this module, called in the rank before its main; it bends one thing at one point.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import socket
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
from sailvl_trainer.data.shards import ShardInfo, ShardReader, ShardWriter
from sailvl_trainer.data.token_counts import TokenCountFiles
from sailvl_trainer.evaluate import stage as evaluate
from sailvl_trainer.evaluate.answer_cache import AnswerCache
from sailvl_trainer.model import export
from sailvl_trainer.rank.main import main as rank_main
from sailvl_trainer.rank.scratch import Scratch
from sailvl_trainer.rank.termination import ERROR_FILE_VARIABLE
from sailvl_trainer.storage import layout
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.train import checkpoint, stage, trainer

LIMIT = 120
"""Seconds that ranks may take."""
LATE_IMPORTS = ["deepspeed", "duckdb", "transformers.models.internvl.modeling_internvl", "torch._dynamo"]
"""What ranks import where they need it; tests themselves don't wait for it."""
BALLAST, SIZE = "ballast", "64M"
EXT4_IOC_SHUTDOWN = 0x8004587D
"""<linux/ext4.h>"""
CLOSE_SECONDS = 5
"""For the neighbours of a rank that died."""
Fault = Callable[[], None]


class Ranks:
    """The ranks of one attempt, without a worker around them."""

    def __init__(self, document: Stage, world_size: int = 2, faults: Sequence[Fault] = ()) -> None:
        """`faults`: by rank, or one for all."""
        beside = Path(document.storage)  # the storage itself may go in a test
        self.folder = beside.with_name(f"{beside.name}-ranks") / f"{document.run}-{document.attempt}"
        self.folder.mkdir(parents=True)
        (self.folder / "stage.json").write_bytes(encode(document))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        place |= {Env.STAGE_FILE: str(self.folder / "stage.json")}
        by_rank = list(faults) * (world_size if len(faults) == 1 else 1) or [do_nothing] * world_size
        self.processes = [self._start(rank, place, by_rank[rank]) for rank in range(world_size)]

    def _start(self, rank: int, place: dict[str, str], fault: Fault) -> ForkServerProcess:
        own = self.folder / f"rank-{rank}"
        Scratch(own).prepare()
        environment = place | {"RANK": str(rank), "LOCAL_RANK": str(rank), Env.SCRATCH: str(own)}
        process = _server().Process(target=_be_rank, args=(environment, own, fault))
        process.start()
        return process

    def end(self) -> list[int]:
        """Exit codes, by rank; of a signal, its number below 0. A dead one ends its neighbours, as agents do."""
        sentinels = [process.sentinel for process in self.processes]
        connection.wait(sentinels, LIMIT)
        for process in self.processes:
            process.join(CLOSE_SECONDS if any(p.exitcode for p in self.processes) else LIMIT)
            process.terminate()
        for process in self.processes:
            process.join(LIMIT)
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, self.log()
        return codes  # type: ignore[return-value]  # none is None

    def said(self, rank: int = 0) -> Termination:
        """The last words of a rank that failed."""
        message: dict[str, str] = decode(dict[str, str], (self.folder / f"rank-{rank}" / "words").read_bytes())
        return decode(Termination, message["message"])

    def log(self) -> str:
        """Of all ranks."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("rank-*/log")))


class Volume:
    """A small disk of its own; `is_disk`: ext4, which can break down, and keeps what was brought to it."""

    def __init__(self, folder: Path, *, is_disk: bool) -> None:
        self.path, self._image = folder / "storage", folder / "image"
        self.path.mkdir()
        self._arguments = ["-t", "tmpfs", "-o", f"size={SIZE}", "none"]
        if is_disk:
            subprocess.run(["truncate", "-s", SIZE, self._image], check=True)
            subprocess.run(["mkfs.ext4", "-q", self._image], check=True)
            self._arguments = ["-o", "loop", str(self._image)]

    def mount(self) -> None:
        """Raises CalledProcessError where that isn't allowed."""
        subprocess.run(["mount", *self._arguments, self.path], check=True, capture_output=True)

    def unmount(self) -> None:
        """If it is there still."""
        subprocess.run(["umount", self.path], check=False, capture_output=True)


def provide_volume(folder: Path, *, is_disk: bool) -> Iterator[Volume]:
    """Mounted, and unmounted at the end; the test is skipped where that isn't allowed."""
    try:
        volume = Volume(folder, is_disk=is_disk)
        volume.mount()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no volume can be mounted here: {error}")
    yield volume
    volume.unmount()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@cache
def _server() -> ForkServerContext:
    """It starts once in a test process. It finds what it imports by the environment alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LATE_IMPORTS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("DS_ACCELERATOR", "cpu")
        forkserver.ensure_running()
    return context


def _be_rank(environment: dict[str, str], own: Path, fault: Fault) -> None:
    """In the forked process."""
    log = os.open(own / "log", os.O_WRONLY | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(environment | {ERROR_FILE_VARIABLE: str(own / "words")})
    torch.set_num_threads(1)
    fault()
    rank_main()


def do_nothing() -> None:
    """The rank meets no fault."""


def die() -> None:
    """As the kernel or a person ends it."""
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop() -> None:
    """As the worker's entry does when SIGTERM arrives."""
    Scratch(Path(os.environ[Env.SCRATCH])).stop_file.touch()


def pause() -> None:
    """As a machine that is cut off, or a debugger, holds it: until SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    """A mistake in the code."""
    raise ValueError("a plain mistake")


def fill(volume: Path) -> None:
    """Somebody else's data takes all the room."""
    with suppress(OSError), (volume / BALLAST).open("wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()


def break_down(volume: Path) -> None:
    """As a disk that dies: from now on, all that is asked of the ext4 volume is answered by EIO."""
    folder = os.open(volume, os.O_RDONLY)
    fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", 1))
    os.close(folder)


def unmount(volume: Path) -> None:
    """It is gone, for whoever looks for a file by its name."""
    subprocess.run(["umount", "-l", volume], check=True)


def at(point: str, do: Callable[[], None]) -> Fault:
    """Do something once a rank has come to a point, which is one of POINTS or `step N`: after that step."""
    assert point in POINTS or point.startswith("step "), point
    return partial(_bend, point, do)


def _bend(point: str, do: Callable[[], None]) -> None:
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

    def bent(*args: Any, **options: Any) -> Any:
        if is_now(*args):
            do()
        return original(*args, **options)

    setattr(owner, name, bent)


def _after(owner: Any, name: str, do: Callable[[], None], is_now: Callable[..., bool]) -> None:
    original = getattr(owner, name)

    def bent(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        if is_now(*args):
            do()
        return result

    setattr(owner, name, bent)


POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "measuring the data": (stage, "prepare", 1, True),
    "counting tokens": (TokenCountFiles, "count", 1, False),
    "starting": (stage, "build_engine", 1, True),
    "evaluating before": (stage.validation, "measure_validation_loss", 1, True),
    "saving, files half written": (checkpoint, "_write_fragments", 2, False),
    "saving, whole but not pruned": (trainer, "delete_old_checkpoints", 2, True),
    "evaluating after": (stage.validation, "measure_validation_loss", 2, True),
    "writing a shard": (ShardWriter, "write", 2, True),
    "writing the report of curation": (curate, "write_report", 1, True),
    "keeping answers": (AnswerCache, "add", 1, True),
    "writing the report of evaluation": (evaluate, "write_report", 1, True),
    "export begun": (stage, "_export", 1, True),
    "exporting": (export, "write_processor", 1, True),
    "exported": (stage, "export_model", 1, False),
    "before the result": (layout.StageFiles, "write_result", 1, True),
    "before the memo": (layout, "write_atomic", 1, False),
}
"""What is called there, which call of it, and whether the fault comes before it or after."""


def spoil(*samples: int) -> None:
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


def explode(step: int) -> None:
    """The update of a step ruins the weights, which are numbers still; from the next step on, the loss is none."""
    original = trainer.Trainer.train_step

    def train(self: trainer.Trainer, loaded: Any) -> None:
        if self.state.step + 1 == step:
            schedule, self.schedule = self.schedule, lambda _: 1e30
            original(self, loaded)
            self.schedule = schedule
        else:
            original(self, loaded)

    trainer.Trainer.train_step = train  # type: ignore[method-assign]


def both(one: Fault, other: Fault) -> None:
    """Two faults."""
    one()
    other()


def next_attempt(document: Stage) -> Stage:
    """The same stage once more."""
    return replace(document, attempt=document.attempt + 1)
