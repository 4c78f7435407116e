"""Folders of models from outside: no code in them runs, and what is wrong is a ConfigError with the folder's name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from sailvl_trainer.contract import ModelConfig
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.model.build import _load, build_model
from sailvl_trainer.model.folders import translate_model_errors
from sailvl_trainer.model.tokenizer import load_tokenizer
from tests.support.builders.evaluation import export_untrained
from tests.support.fuzz import draw_generators, mutate_bytes

TINY = ModelConfig(preset="tiny")
BERT = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 8,
    "architectures": ["BertModel"],
}


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def pickle_weights(folder: Path, marker: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))


def save_weights_with_torch(folder: Path, marker: Path) -> None:
    torch.save({"x": Evil(marker)}, folder / "pytorch_model.bin")


def add_remote_code(folder: Path, marker: Path) -> None:
    auto_map = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    (folder / "config.json").write_text(json.dumps(BERT | {"model_type": "evil", "auto_map": auto_map}))
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")


def write_huge_header(folder: Path, _: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def write_nested_header(folder: Path, _: Path) -> None:
    (folder / "model.safetensors").write_bytes((9_000_000).to_bytes(8, "little") + b"[" * 9_000_000)


def write_empty_weights(folder: Path, _: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def write_nested_config(folder: Path, _: Path) -> None:
    (folder / "config.json").write_text('{"x":' * 100_000)


def write_config_of_another_type(folder: Path, _: Path) -> None:
    (folder / "config.json").write_text("[1]")


def write_impossible_sizes(folder: Path, _: Path) -> None:
    (folder / "config.json").write_text(json.dumps(BERT | {"hidden_size": "x"}))


FOLDERS: list[Callable[[Path, Path], None]] = [
    pickle_weights,
    save_weights_with_torch,
    add_remote_code,
    write_huge_header,
    write_nested_header,
    write_empty_weights,
    write_nested_config,
    write_config_of_another_type,
    write_impossible_sizes,
]


@pytest.mark.parametrize("write", FOLDERS, ids=lambda write: write.__name__)
def test_hostile_model_folder_is_a_config_error(write: Callable[[Path, Path], None], tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "code-ran"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BERT))
    write(folder, marker)
    with pytest.raises(ConfigError, match=f"cannot load a model from {folder}"):
        _load(AutoModel, folder)
    assert not marker.exists()


TOKENIZERS = [
    pytest.param(
        {"tokenizer_config.json": '{"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", null]}}'},
        id="remote code",
    ),
    pytest.param({"tokenizer.json": "{" * 100_000}, id="nested too deeply"),
    pytest.param({"tokenizer.json": "[]", "tokenizer_config.json": "[]"}, id="other types"),
    pytest.param({"tokenizer_config.json": '{"tokenizer_class": 7}'}, id="class that is no name"),
    pytest.param({}, id="no tokenizer"),
]


@pytest.mark.parametrize("files", TOKENIZERS)
def test_hostile_tokenizer_is_a_config_error(files: dict[str, str], tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "code-ran"
    folder.mkdir()
    add_remote_code(folder, marker)
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=str(folder)):
        load_tokenizer(ModelConfig(preset="tiny", language=str(folder)))
    assert not marker.exists()


def test_error_of_the_volume_is_none_of_the_folder() -> None:
    with pytest.raises(OSError, match="Input/output error"), translate_model_errors("/data/model"):
        raise OSError(5, "Input/output error")


def test_lack_of_memory_is_no_error_of_the_folder() -> None:
    with pytest.raises(MemoryError), translate_model_errors("/data/model"):
        raise MemoryError


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_untrained(tmp_path_factory.mktemp("storage")) / "model/export"


def test_export_that_lacks_a_weight_is_a_config_error(export: Path, tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    weights = load_file(folder / "model.safetensors")
    weights.pop("language_model.model.layers.0.post_attention_layernorm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks model\.language_model\.layers\.0\.post_attention_layernorm\.weight"):
        build_model(TINY, load_tokenizer(TINY, folder), init_from=folder)


HUGE = [("num_hidden_layers", 10**7), ("hidden_size", 10**6), ("vocab_size", 10**10), ("intermediate_size", "x")]


@pytest.mark.parametrize(("name", "value"), HUGE)
def test_huge_model_is_refused_before_it_is_built(name: str, value: object, export: Path, tmp_path: Path) -> None:
    """Ten million layers without weights would be built for minutes and fill the memory."""
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    config = json.loads((folder / "config.json").read_bytes())
    config["text_config"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=str(folder)):
        build_model(TINY, load_tokenizer(TINY, folder), init_from=folder)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_any_change_of_an_export_is_loaded_or_refused(name: str, export: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    content = (folder / name).read_bytes()
    for generator in draw_generators(4, minimum=0):
        # weights have a short header, so that most changes of the file as a whole would only change numbers
        head = mutate_bytes(content[:20_000], generator)
        (folder / name).write_bytes(head + content[20_000:])
        try:
            build_model(TINY, load_tokenizer(TINY, folder), init_from=folder)
        except ConfigError:
            continue
        except BaseException as error:
            error.add_note(f"repeat with SAILVL_FUZZ_SEED={generator.number}")  # type: ignore[attr-defined]
            raise
