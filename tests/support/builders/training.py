"""Builders for tests of training: a small prepared set, a stage document to bend, ranks as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sailvl_trainer.contract import ModelConfig, Stage, TrainConfig
from sailvl_trainer.data.samples import Message
from sailvl_trainer.data.shards import ShardWriter
from sailvl_trainer.data.synthetic import draw_question
from sailvl_trainer.demo.build_data import make_questions
from sailvl_trainer.rank.context import Context, build_context
from sailvl_trainer.rank.settings import Scratch
from sailvl_trainer.rank.store import STORE_VARIABLE, StoreAddress
from sailvl_trainer.storage.codec import encode, read_stage
from sailvl_trainer.storage.shard_manifest import write_shard_manifest

SAMPLES = 40


def build_set(directory: Path) -> Path:
    """Questions of level 1, with held-out ones."""
    make_questions(directory, level=1, number=SAMPLES)
    return directory


class OtherTokenizer:
    """A counter of another tokenizer, under which every dialogue has one token."""

    fingerprint = "another tokenizer"

    def count(self, messages: tuple[Message, ...], *, has_image: bool) -> tuple[int, int]:
        """Return one text token and one loss token."""
        return 1, 1


def build_set_of_another_tokenizer(directory: Path, *, shards: int = 5, shard_samples: int = 8) -> Path:
    """Build a prepared set whose index was counted by another tokenizer; one shard is held out."""
    for split, first, number in (("shards", 0, shards), ("held-out", shards, 1)):
        infos = []
        for shard in range(first, first + number):
            with ShardWriter(directory / split, f"{shard:05d}", OtherTokenizer()) as writer:
                for row in range(shard_samples):
                    writer.write(draw_question(0, shard * shard_samples + row, 1))
            assert writer.info is not None
            infos.append(writer.info)
        write_shard_manifest(directory / split, infos)
    return directory


def build_stage(root: Path, *, run: str = "demo", attempt: int = 1, **train: Any) -> Stage:
    """Two epochs over `root`/set, in 8 steps of 2 packs; `train` replaces settings."""
    settings = TrainConfig(
        train=("vision", "connector", "language"),
        data=(str(root / "set"),),
        learning_rate=1e-3,
        epochs=2.0,
        batch_tokens=512,
        pack_tokens=256,
        pack_tiles=16,
        max_tiles=1,
        precision="fp32",
        checkpoint_steps=3,
        held_out_samples=4,
    )
    return Stage(
        namespace="team",
        run=run,
        stage="knowledge",
        kind="sft",
        attempt=attempt,
        digest=f"digest-of-{run}",
        storage=str(root),
        output=str(root / run / "knowledge"),
        model=ModelConfig(preset="tiny"),
        train=replace(settings, **train),
    )


def join_ranks() -> Context:
    """Build the context of a rank that `start_ranks` has started."""
    torch.set_num_threads(1)
    rank, scratch = int(os.environ["RANK"]), Path(os.environ["SCRATCH"])
    own = scratch / f"rank-{rank}"
    own.mkdir()
    stage = read_stage(Path(os.environ["STAGE"]))
    return build_context(stage, device=torch.device("cpu"), rank=rank, local_rank=0, scratch=Scratch(own))


def start_ranks(script: Path, stage: Stage, world_size: int, scratch: Path) -> list[subprocess.Popen[bytes]]:
    """A script on every rank of a group over gloo; it finds the stage document at $STAGE and a folder at $SCRATCH."""
    scratch.mkdir(parents=True)
    (scratch / "stage.json").write_bytes(encode(stage))
    store = StoreAddress(path=str(scratch / "store"))
    processes = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        settings = place | {STORE_VARIABLE: encode(store).decode(), "STAGE": scratch / "stage.json", "SCRATCH": scratch}
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
        with (scratch / f"log-{rank}").open("wb") as log:
            processes.append(subprocess.Popen([sys.executable, script], env=environment, stdout=log, stderr=log))
    return processes
