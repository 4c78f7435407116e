"""YAML files of runs, for the verbs that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sailvl_operator.api import names


def read_documents(path: Path) -> list[dict[str, Any]]:
    """All SailVLRuns of a file. Raises ValueError that names the file, and the line of broken YAML."""
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text()) if d is not None]
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    runs = [d for d in documents if isinstance(d, dict) and d.get("kind") == names.KIND]
    if not runs:
        raise ValueError(f"{path}: holds no {names.KIND}; write kind: {names.KIND}")
    return runs
