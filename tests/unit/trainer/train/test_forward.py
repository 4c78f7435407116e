"""The forward pass on packs equals a plain implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from sailvl_trainer.contract import ModelConfig
from sailvl_trainer.data.chat import IGNORE_INDEX
from sailvl_trainer.data.collate import Batch, collate
from sailvl_trainer.data.dataset import ShardDataset, build_dataset, list_shards
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.model.build import build_model, set_trainable
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.train.forward import PackedModel
from tests.support.builders.training import build_set

TINY, CPU = ModelConfig(preset="tiny"), torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    return SampleEncoder(tokenizer=load_tokenizer(TINY), preset=get_preset("tiny"), max_tiles=1, pack_tokens=256)


@pytest.fixture(scope="module")
def dataset(encoder: SampleEncoder, tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return build_dataset(list_shards([build_set(tmp_path_factory.mktemp("set"))], "shards"), encoder)


@pytest.fixture
def model(encoder: SampleEncoder) -> PackedModel:
    return PackedModel(build_model(TINY, encoder.tokenizer, seed=1))


def test_packed_logits_equal_those_of_single_samples(
    model: PackedModel, dataset: ShardDataset, encoder: SampleEncoder
) -> None:
    pack = (7, 2, 5, 11)
    lengths, _ = dataset.lengths(np.array(pack))
    packed, at = _logits(model, collate(dataset, encoder, pack)), 0
    for sample, length in zip(pack, lengths.tolist(), strict=True):
        alone = _logits(model, collate(dataset, encoder, (sample,)))[:length]
        torch.testing.assert_close(packed[at : at + length], alone, atol=1e-5, rtol=0)
        at += length


def test_loss_equals_masked_loss_of_all_logits(
    model: PackedModel, dataset: ShardDataset, encoder: SampleEncoder
) -> None:
    batch = collate(dataset, encoder, (0, 1, 2))
    expected = functional.cross_entropy(
        _logits(model, batch), batch.labels_1T[0], ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(model(**batch.to(CPU).model_inputs), expected)
    assert batch.loss_tokens == int((batch.labels_1T != IGNORE_INDEX).sum()) > 0


def test_empty_pack_has_zero_loss_but_gradients_for_all_trainable_parameters(
    model: PackedModel, dataset: ShardDataset, encoder: SampleEncoder
) -> None:
    loss = model(**collate(dataset, encoder, ()).model_inputs)
    loss.backward()
    assert loss == 0
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name for name in without if "vision_tower" not in name} == set()
    assert any("vision_tower" in name for name, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("pack", [pytest.param((0, 1), id="images"), pytest.param((), id="none")])
def test_vision_tower_runs_once_per_batch(
    pack: tuple[int, ...], model: PackedModel, dataset: ShardDataset, encoder: SampleEncoder
) -> None:
    calls: list[int] = []
    model.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model(**collate(dataset, encoder, pack).model_inputs)
    assert calls == [1]


def test_frozen_parts_stay_in_evaluation_mode(model: PackedModel) -> None:
    set_trainable(model.model, ("connector",))
    model.train()
    inner = model.model.model
    assert inner.multi_modal_projector.training
    assert not inner.vision_tower.training
    assert not inner.language_model.training


def _logits(model: PackedModel, batch: Batch) -> torch.Tensor:
    given = batch.model_inputs
    del given["labels_1T"]
    with torch.no_grad():
        return model.model.lm_head(model.encode(**given))  # type: ignore[no-any-return]
