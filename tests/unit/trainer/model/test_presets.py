"""Presets match the published sizes; an export is loaded by transformers and prepares inputs as training does."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, InternVLForConditionalGeneration

from sailvl_trainer.contract import ModelConfig
from sailvl_trainer.data.chat import encode_prompt
from sailvl_trainer.data.samples import Message
from sailvl_trainer.data.tiles import choose_grid, count_tiles, cut_tiles
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.model.build import (
    build_config,
    build_model,
    count_parameters,
    make_features_contiguous,
    set_trainable,
)
from sailvl_trainer.model.export import export_model
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer

TINY = ModelConfig(preset="tiny")

# Millions of parameters of the vision tower, the connector and the language model, and the connector's widths.
# Sources: the model cards of InternViT-300M-448px, Qwen2.5-1.5B (1.54B), Qwen2.5-7B (7.62B), Qwen3-1.7B; AIMv2-Huge.
PUBLISHED = [
    pytest.param("sail-vl-2b", (304.01, 8.66, 1543.71), (4096, 1536), id="2B: InternViT-300M and Qwen2.5-1.5B"),
    pytest.param("sail-vl-8b", (304.01, 27.54, 7615.62), (4096, 3584), id="8B: InternViT-300M and Qwen2.5-7B"),
    pytest.param("sail-vl2-2b", (682.03, 16.79, 1720.57), (6144, 2048), id="VL2 2B: SAILViT-Huge and Qwen3-1.7B"),
]


@pytest.mark.parametrize(("name", "millions", "widths"), PUBLISHED)
def test_parameter_counts_match_the_published_ones(
    name: str, millions: tuple[float, ...], widths: tuple[int, int]
) -> None:
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(build_config(get_preset(name), load_tokenizer(TINY)))
    connector = model.model.multi_modal_projector
    language = torch.nn.ModuleList([model.model.language_model, model.lm_head])
    counted = [count_parameters(part) / 1e6 for part in (model.model.vision_tower, connector, language)]
    assert counted == pytest.approx(millions, rel=0.002)
    wide, narrow = widths
    shapes = {key: tuple(parameter.shape) for key, parameter in connector.named_parameters() if parameter.ndim > 1}
    assert shapes == {"linear_1.weight": (narrow, wide), "linear_2.weight": (narrow, narrow)}
    assert connector.layer_norm.normalized_shape == (wide,)
    assert get_preset(name).tokens_per_tile == 256


@pytest.mark.parametrize("name", ["sail-vl-2b", "sail-vl2-2b"])
def test_tile_fills_tokens_per_tile(name: str) -> None:
    small = replace(get_preset(name), vision=get_preset(name).vision | {"num_hidden_layers": 1})
    small = replace(small, text=small.text | {"num_hidden_layers": 1, "vocab_size": 700})
    with torch.device("meta"):
        model = make_features_contiguous(InternVLForConditionalGeneration(build_config(small, load_tokenizer(TINY))))
        features = model.model.get_image_features(
            torch.zeros(2, 3, 448, 448),
            vision_feature_layer=-1,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        )
    assert features.pooler_output.shape == (2, small.tokens_per_tile, small.text["hidden_size"])


def test_unknown_preset_raises_config_error_listing_the_presets() -> None:
    with pytest.raises(ConfigError, match="sail-vl-2b, sail-vl-8b, sail-vl2-2b, tiny"):
        get_preset("huge")


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
def test_set_trainable_freezes_all_other_parts(parts: tuple[str, ...], modules: set[str]) -> None:
    model = build_model(TINY, load_tokenizer(TINY))
    trainable = set_trainable(model, parts)  # type: ignore[arg-type]
    assert {name.split(".")[1] for name in trainable} == modules


def test_same_seed_gives_same_weights() -> None:
    tokenizer = load_tokenizer(TINY)
    a, b, c = (build_model(TINY, tokenizer, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_export_is_loaded_by_transformers_and_generates(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    model = build_model(TINY, tokenizer, seed=1)
    export_model(model, tokenizer, get_preset("tiny"), tmp_path / "export")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "export").eval()
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    text = f"<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 16}</img>\nWhich shape?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([loaded_tokenizer.encode(text)])
    output = loaded.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.zeros(1, 3, 112, 112), max_new_tokens=4
    )
    assert output.shape[1] > ids.shape[1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))


def test_exported_chat_template_equals_the_training_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    export_model(build_model(TINY, tokenizer), tokenizer, get_preset("tiny"), tmp_path / "export")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "export")
    turns = (Message(role="system", content="Be brief."), Message(role="user", content="Which shape is red?"))
    rendered = loaded.apply_chat_template([asdict(turn) for turn in turns], add_generation_prompt=True, tokenize=False)
    assert loaded.encode(rendered) == encode_prompt(turns, tokenizer, 0)
    assert len(loaded) == len(tokenizer)


def test_exported_processor_prepares_inputs_as_training_does(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="transformers' InternVLProcessor needs torchvision")
    tokenizer = load_tokenizer(TINY)
    export_model(build_model(TINY, tokenizer), tokenizer, get_preset("tiny"), tmp_path / "export")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 230, 3), dtype=np.uint8))
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Which shape?"}]
    given = AutoProcessor.from_pretrained(tmp_path / "export").apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    grid = choose_grid(image.width, image.height, 12, 112)
    prompt = encode_prompt((Message(role="user", content="<image>\nWhich shape?"),), tokenizer, count_tiles(grid) * 16)
    assert given["input_ids"][0].tolist() == prompt
    assert np.abs(cut_tiles(image, grid, 112) - given["pixel_values"].numpy()).max() < 0.05
