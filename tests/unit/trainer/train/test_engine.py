"""The engine's step equals one loss over the whole step with torch's AdamW; frozen parameters stay untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sailvl_trainer.contract import ModelConfig, Part, TrainConfig
from sailvl_trainer.data.collate import Batch, collate
from sailvl_trainer.data.dataset import ShardDataset, build_dataset, list_shards
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.model.build import build_model, set_trainable
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.distributed import start_process_group
from sailvl_trainer.train.engine import build_engine, check_frozen
from sailvl_trainer.train.forward import PackedModel
from sailvl_trainer.train.optimizer import build_optimizer
from tests.support.builders.training import build_set, build_stage

pytestmark = pytest.mark.slow
TINY, CPU = ModelConfig(preset="tiny"), torch.device("cpu")
ALL: tuple[Part, ...] = ("vision", "connector", "language")

RATE = 1e-3
"""Two steps are made; an error of one percent of them is allowed, which rounding causes where gradients are tiny."""
WITHOUT_GRADIENT = "attention.k_proj.bias"
"""Softmax is invariant to a bias of all keys: its gradient is rounding error, but Adam makes full steps by its sign."""


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    if not dist.is_initialized():
        start_process_group(CPU)


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    return SampleEncoder(tokenizer=load_tokenizer(TINY), preset=get_preset("tiny"), max_tiles=1, pack_tokens=256)


@pytest.fixture(scope="module")
def dataset(encoder: SampleEncoder, tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return build_dataset(list_shards([build_set(tmp_path_factory.mktemp("set"))], "shards"), encoder)


def build(encoder: SampleEncoder) -> PackedModel:
    return PackedModel(build_model(TINY, encoder.tokenizer, seed=1))


PARTS = [
    pytest.param(("connector",), 1.0, id="alignment"),
    pytest.param(("vision", "connector"), 1.0, id="advance"),
    pytest.param(ALL, 1e9, id="all parts, not clipped"),
    pytest.param(ALL, 0.05, id="all parts, clipped"),
]


@pytest.mark.parametrize(("parts", "clip"), PARTS)
def test_engine_step_equals_plain_adamw(
    parts: tuple[Part, ...], clip: float, dataset: ShardDataset, encoder: SampleEncoder, tmp_path: Path
) -> None:
    config = build_stage(tmp_path, clip_norm=clip, train=parts).train
    assert config is not None
    ours, plain = build(encoder), build(encoder)
    trainable_names = set_trainable(ours.model, parts)
    set_trainable(plain.model, parts)
    steps = [[collate(dataset, encoder, pack) for pack in packs] for packs in (((0, 1), (2,)), ((3, 4), ()))]
    expected = _train_plainly(plain, config, steps)
    engine = build_engine(ours, build_stage(tmp_path).engine, config, device=CPU)
    norms = []
    for batches in steps:
        loss_tokens = sum(batch.loss_tokens for batch in batches)
        for batch in batches:
            engine.backward(ours(**batch.to(CPU).model_inputs), loss_tokens)
        norms.append(engine.step(RATE))
    check_frozen(engine, trainable_names)
    assert norms == pytest.approx(expected, rel=1e-4)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if not name.endswith(WITHOUT_GRADIENT):
            torch.testing.assert_close(p, q, atol=0.01 * 2 * RATE, rtol=0, msg=name)


def test_check_frozen_detects_gradient_and_optimizer_state(encoder: SampleEncoder, tmp_path: Path) -> None:
    config = build_stage(tmp_path).train
    assert config is not None
    model = build(encoder)
    trainable_names = set_trainable(model.model, ("connector",))
    engine = build_engine(model, build_stage(tmp_path).engine, config, device=CPU)
    with pytest.raises(AssertionError, match="frozen parameters have optimizer state"):
        check_frozen(engine, trainable_names[1:])
    frozen = model.model.lm_head.weight
    frozen.grad = torch.zeros_like(frozen)
    with pytest.raises(AssertionError, match="have a gradient"):
        check_frozen(engine, trainable_names)


def _train_plainly(model: PackedModel, config: TrainConfig, steps: list[list[Batch]]) -> list[float]:
    """Train without an engine, with one loss over the whole step; return the gradient norms."""
    optimizer, norms = build_optimizer(model, config), []
    for batches in steps:
        loss = sum(model(**batch.to(CPU).model_inputs) for batch in batches) / sum(
            batch.loss_tokens for batch in batches
        )
        loss.backward()
        trainable_names = [p for p in model.parameters() if p.requires_grad]
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable_names, config.clip_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return norms
