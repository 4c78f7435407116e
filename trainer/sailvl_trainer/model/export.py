"""Exports a model as a Hugging Face folder that transformers loads without code of this project."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from sailvl_trainer.model.presets import Preset
from sailvl_trainer.model.processor import write_processor
from sailvl_trainer.storage.atomic import sync_directory, sync_file
from sailvl_trainer.storage.errors import translate_storage_errors


def export_model(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    preset: Preset,
    path: Path,
    *,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the folder under a temporary name, sync it and rename it, so that a folder at `path` is always complete.

    `check` is called just before the rename; what it raises is raised. Each call uses its own temporary name, so that a
    superseded attempt that is still writing does no harm. Raises StorageError if the volume is full or unavailable.
    """
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with translate_storage_errors(temporary):
            model.save_pretrained(temporary, safe_serialization=True)
            tokenizer.save_pretrained(temporary)
            write_processor(preset, temporary)
            for file in filter(Path.is_file, temporary.rglob("*")):
                sync_file(file)
            sync_directory(temporary)
        check()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
    sync_directory(path.parent)
