"""YAML files of runs, for the verbs that read them: read as Kubernetes reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sailvl_operator.api import names

Document = dict[str, Any]


def read_documents(path: Path) -> list[Document]:
    """All SailVLRuns of a file. Raises ValueError that names the file, and the line of broken YAML."""
    runs = [document for document in read_all(path) if is_ours(document)]
    if not runs:
        raise ValueError(f"{path}: holds no {names.KIND}; write kind: {names.KIND}")
    return runs


def read_all(path: Path) -> list[Document]:
    """All objects of a file, of whatever kind. Raises ValueError as read_documents does."""
    try:
        documents = [d for d in yaml.load_all(path.read_text(), Loader=_Loader) if d is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, dict):
            raise ValueError(f"{path}: document {number} is no object; write apiVersion, kind, metadata and spec")
    return documents


def is_ours(document: Document) -> bool:
    """A run, or meant as one: its kind or its group says so."""
    version = str(document.get("apiVersion", ""))
    return document.get("kind") == names.KIND or version.startswith(f"{names.GROUP}/")


class _Loader(yaml.SafeLoader):
    """YAML as the API server's clients take it: 2e-4 is a number, a date is a string, no key is there twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as the base has it
        first: [(tag, pattern) for tag, pattern in known if tag not in ("tag:yaml.org,2002:timestamp",)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that is there twice, which Kubernetes refuses too."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)
