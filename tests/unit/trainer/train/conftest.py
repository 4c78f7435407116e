"""Fixtures of the tests of the dataset cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.rank.context import Context
from tests.support.builders.training import build_set_of_another_tokenizer
from tests.support.dataset_cache import SHARDS, build_claimed_context, build_encoder, note_counted


@pytest.fixture(scope="module")
def uncounted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a set whose samples another tokenizer counted."""
    return build_set_of_another_tokenizer(tmp_path_factory.mktemp("data") / "set", shards=SHARDS)


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    """Return the encoder that counts the samples again."""
    return build_encoder()


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Return the context of a claimed stage with one rank."""
    return build_claimed_context(tmp_path)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the shards that are counted from now on."""
    return note_counted(monkeypatch)
