"""The presets have the published sizes; an export loads without code of ours and answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from sailvl_trainer.contract import ModelConfig
from sailvl_trainer.model.build import build_config, build_model, count_parameters
from sailvl_trainer.model.export import export_model
from sailvl_trainer.model.freeze import set_trainable
from sailvl_trainer.model.presets import preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.runtime.errors import ConfigError

TINY = ModelConfig(preset="tiny")

PUBLISHED = [
    pytest.param("sail-vl-2b", 304.0, 8.7, 1543.7, id="2B: InternViT-300M and Qwen2.5-1.5B"),
    pytest.param("sail-vl-8b", 304.0, 27.5, 7615.6, id="8B: InternViT-300M and Qwen2.5-7B"),
]


@pytest.mark.parametrize(("name", "vision", "connector", "language"), PUBLISHED)
def test_parameters_are_as_published(name: str, vision: float, connector: float, language: float) -> None:
    from transformers import InternVLForConditionalGeneration

    with torch.device("meta"):
        model = InternVLForConditionalGeneration(build_config(preset(name), load_tokenizer(TINY)))
    language_model = torch.nn.ModuleList([model.model.language_model, model.lm_head])
    counted = [
        count_parameters(m) / 1e6 for m in (model.model.vision_tower, model.model.multi_modal_projector, language_model)
    ]
    assert counted == pytest.approx([vision, connector, language], rel=0.005)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="sail-vl-2b, sail-vl-8b, tiny"):
        preset("huge")


PARTS = [
    pytest.param(("connector",), {"multi_modal_projector"}, id="alignment"),
    pytest.param(("vision", "connector"), {"vision_tower", "multi_modal_projector"}, id="advance"),
    pytest.param(
        ("vision", "connector", "language"),
        {"vision_tower", "multi_modal_projector", "language_model"},
        id="fine-tuning",
    ),
]


@pytest.mark.parametrize(("parts", "modules"), PARTS)
def test_what_learns(parts: tuple[str, ...], modules: set[str]) -> None:
    model = build_model(TINY, load_tokenizer(TINY))
    learning = set_trainable(model, parts)  # type: ignore[arg-type]
    assert {name.split(".")[1] for name in learning} == modules


def test_the_same_seed_gives_the_same_weights() -> None:
    tokenizer = load_tokenizer(TINY)
    a, b, c = (build_model(TINY, tokenizer, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_an_export_loads_and_generates(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    model = build_model(TINY, tokenizer, seed=1)
    export_model(model, tokenizer, preset("tiny"), tmp_path / "export")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "export").eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "export")
    text = f"<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 16}</img>\nWhich shape?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([words.encode(text)])
    output = loaded.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.zeros(1, 3, 112, 112), max_new_tokens=4
    )
    assert output.shape[1] > ids.shape[1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
