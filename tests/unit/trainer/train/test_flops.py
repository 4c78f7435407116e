"""Counted FLOPs match torch's own counter; the step timer derives rates and MFU from them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sailvl_trainer.contract import ModelConfig, Part
from sailvl_trainer.data.collate import Batch
from sailvl_trainer.model.build import build_model, set_trainable
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.train.forward import PackedModel
from sailvl_trainer.train.throughput import PEAK_FLOPS, StepTimer, build_flops_counter, get_peak_flops

LENGTH = 256


def build_batch(image_token: int) -> Batch:
    """Build a pack of one sample with two tiles, without padding; every token is a loss token."""
    ids_T = torch.arange(10, 10 + LENGTH)
    ids_T[:32] = image_token
    return Batch(
        input_ids_1T=ids_T[None],
        labels_1T=torch.full((1, LENGTH), 7),
        position_ids_1T=torch.arange(LENGTH)[None],
        pixels_N3HW=torch.zeros(2, 3, 112, 112),
        samples=(0,),
        tokens=LENGTH,
        loss_tokens=LENGTH,
        tiles=2,
        attention_pairs=LENGTH**2,
    )


@pytest.mark.parametrize(
    "trained",
    [
        pytest.param(("connector",), id="connector"),
        pytest.param(("vision", "connector"), id="vision and connector"),
        pytest.param(("vision", "connector", "language"), id="all"),
        pytest.param(("language",), id="language"),
    ],
)
@pytest.mark.slow
def test_flops_match_the_torch_flop_counter(trained: tuple[Part, ...]) -> None:
    config = ModelConfig(preset="tiny")
    model = build_model(config, load_tokenizer(config), init_from=None, seed=0)
    set_trainable(model, trained)
    batch = build_batch(model.config.image_token_id)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        PackedModel(model)(**batch.model_inputs).backward()
    counted = build_flops_counter(model, get_preset("tiny"), trained).count([batch])
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_known_device_has_the_peak_of_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert get_peak_flops(torch.device("cuda"), is_bf16=True) == PEAK_FLOPS["H100 PCIe"]


def test_unknown_device_is_measured() -> None:
    assert get_peak_flops(torch.device("cpu"), is_bf16=False) > 1e9


def test_step_timer_reports_phases_and_rates() -> None:
    timer = StepTimer(world_size=2, pack_tokens=100, peak_flops=10.0, _previous_end=10.0)
    with timer.phase("forward"):
        pass
    first = timer.end_step(tokens=300, microbatches=2, flops=8.0, now=12.0)
    second = timer.end_step(tokens=400, microbatches=2, flops=8.0, now=13.0)
    assert first.keys() == {"forward_seconds", "tokens_per_second", "pack_fill", "mfu"}
    assert (first["tokens_per_second"], first["pack_fill"]) == (150.0, 0.75)
    assert second == {"tokens_per_second": 400.0, "pack_fill": 1.0, "mfu": 0.4}
    assert timer.mean_step_seconds == pytest.approx(1.9)
