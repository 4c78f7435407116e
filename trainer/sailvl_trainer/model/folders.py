"""Errors of transformers while it loads a folder that people outside of the project made.

Weights are read from safetensors only, since other formats run code when they are read, and code in the folder is never
run. Everything else that can be wrong with a folder raises one of many exceptions of several libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sailvl_trainer.errors import ConfigError, TrainerError
from sailvl_trainer.storage.files import explain_storage_error

MAX_MESSAGE_LENGTH = 500
"""Longest part of a library's message in the error; some quote the file."""


@contextmanager
def translate_model_errors(source: Path | str) -> Iterator[None]:
    """Raise ConfigError, which names the folder, in place of an error of its files.

    Errors of an unavailable volume and of too little memory are no errors of the folder and pass unchanged.
    """
    try:
        yield
    except (TrainerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if explain_storage_error(error, Path(source)) is not None:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"cannot load a model from {source}: {text[:MAX_MESSAGE_LENGTH]}; set a folder with safetensors weights, "
            "config.json and tokenizer files that transformers loads without code of its own"
        ) from error
