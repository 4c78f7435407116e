"""Building a model from pretrained parts; parts that don't fit raise ConfigError."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sailvl_trainer.contract import ModelConfig
from sailvl_trainer.data.synthetic import draw_scene
from sailvl_trainer.demo.tiny_lm import GRID, describe_as_grid, pretrain
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.model.build import build_config, build_model
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer

TINY = ModelConfig(preset="tiny")


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "language"
    pretrain(directory, steps=2)
    return directory


def test_pretrained_language_model_is_loaded_and_the_rest_initialised_from_the_seed(language: Path) -> None:
    config = ModelConfig(preset="tiny", language=str(language))
    built = build_model(config, load_tokenizer(config), seed=3).state_dict()
    fresh = build_model(TINY, load_tokenizer(TINY), seed=3).state_dict()
    other = {name for name in fresh if not torch.equal(fresh[name], built[name])}
    assert other
    assert all("language_model" in name or "lm_head" in name for name in other)


def test_pretrained_vision_tower_is_loaded(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    tower = build_model(TINY, tokenizer, seed=5).model.vision_tower
    tower.save_pretrained(tmp_path / "vision")
    built = build_model(ModelConfig(preset="tiny", vision=str(tmp_path / "vision")), tokenizer, seed=3)
    for name, weight in built.model.vision_tower.state_dict().items():
        assert torch.equal(weight, tower.state_dict()[name]), name


@pytest.mark.parametrize("field", ["vision", "language"])
def test_part_of_another_size_raises_config_error_naming_the_field(field: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    config = build_config(get_preset("tiny"), tokenizer)
    config.vision_config.hidden_size = config.text_config.hidden_size = 64
    config.text_config.head_dim = 16
    from transformers import AutoModel, AutoModelForCausalLM

    kinds = {"vision": (AutoModel, config.vision_config), "language": (AutoModelForCausalLM, config.text_config)}
    kind, part = kinds[field]
    kind.from_config(part).save_pretrained(tmp_path / "part")
    with pytest.raises(ConfigError, match=rf"model\.{field} does not fit the preset"):
        build_model(ModelConfig(preset="tiny", **{field: str(tmp_path / "part")}), tokenizer)


@pytest.mark.parametrize("field", ["vision", "language"])
def test_folder_without_a_model_raises_config_error_naming_it(field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        build_model(ModelConfig(preset="tiny", **{field: str(tmp_path)}), load_tokenizer(TINY))


def test_large_preset_without_language_model_raises_config_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.language is not set: preset sail-vl-2b"):
        load_tokenizer(ModelConfig(preset="sail-vl-2b"))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_grid_quarter_holds_the_phrase_of_its_group(level: int) -> None:
    scene, rng = draw_scene(0, 5, level)
    grid = np.array(describe_as_grid(scene, rng)).reshape(GRID, GRID)
    for group in scene.groups:
        rows = slice(GRID // 2, None) if group.corner.startswith("bottom") else slice(0, GRID // 2)
        columns = slice(GRID // 2, None) if group.corner.endswith("right") else slice(0, GRID // 2)
        assert set(grid[rows, columns].ravel()) >= set(group.phrase.split())
    assert scene.word in {"", *grid.ravel()}
