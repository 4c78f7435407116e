"""Helpers of the tests of the dataset cache, whose data was counted by another tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sailvl_trainer.contract import ModelConfig
from sailvl_trainer.data.dataset import ShardDataset
from sailvl_trainer.data.encoder import SampleEncoder, TokenCounter
from sailvl_trainer.data.shards import ShardReader
from sailvl_trainer.data.token_counts import TokenCountFiles
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.context import Context, build_single_process_context
from sailvl_trainer.storage.lineage import claim_stage
from sailvl_trainer.train.dataset_cache import INDEX_DIR, open_dataset
from tests.support.builders.training import build_stage

SHARDS = 5


def build_encoder() -> SampleEncoder:
    """Return the encoder of preset tiny."""
    tokenizer = load_tokenizer(ModelConfig(preset="tiny"))
    return SampleEncoder(tokenizer=tokenizer, preset=get_preset("tiny"), max_tiles=1, pack_tokens=256)


def build_claimed_context(root: Path) -> Context:
    """Return the context of an attempt that has claimed its stage, as a rank does first."""
    context = build_single_process_context(build_stage(root), scratch=root / "scratch")
    claim_stage(context.files, context.stage.attempt)
    return context


def note_counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the shards whose tokens are counted, in order."""
    names: list[str] = []
    count_shard = TokenCounter.count_shard

    def count_and_note(self: TokenCounter, reader: ShardReader, *on_row: Callable[[int], None]) -> np.ndarray:
        tokens = count_shard(self, reader, *on_row)
        names.append(reader.path.stem)
        return tokens

    monkeypatch.setattr(TokenCounter, "count_shard", count_and_note)
    return names


def open_shards(context: Context, directory: Path, encoder: SampleEncoder) -> ShardDataset:
    """Open the shards of a set."""
    return open_dataset(context, [directory], "shards", encoder)


def list_cache(context: Context) -> list[str]:
    """Return the names of the files in the cache."""
    return sorted(path.name for path in (context.files.output / INDEX_DIR).iterdir())


def count_some(
    context: Context, directory: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch, *, shards: int
) -> Path:
    """Fail after counting `shards` shards; return the folder of their files."""
    done: list[int] = []
    count = TokenCountFiles.count

    def count_or_fail(self: TokenCountFiles, *args: Any) -> None:
        if len(done) == shards:
            raise RuntimeError("killed")
        count(self, *args)
        done.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(TokenCountFiles, "count", count_or_fail)
        with pytest.raises(RuntimeError, match="killed"):
            open_shards(context, directory, encoder)
    (folder,) = (context.files.output / INDEX_DIR).iterdir()
    return folder
