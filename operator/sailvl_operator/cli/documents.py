"""Reads YAML files of runs as the clients of Kubernetes do, for the subcommands that take a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sailvl_operator.api import names

Document = dict[str, Any]


def read_documents(path: Path) -> list[Document]:
    """Return all SailVLRuns of a file.

    Raises ValueError, which names the file and the line of the error, if the file is invalid or has no SailVLRun.
    """
    runs = [document for document in read_all(path) if is_run(document)]
    if not runs:
        raise ValueError(f"{path}: no {names.KIND} found; set kind: {names.KIND}")
    return runs


def read_all(path: Path) -> list[Document]:
    """Return all objects of a file, of any kind. Raises ValueError if the file is not valid YAML with objects."""
    try:
        documents = [d for d in yaml.load_all(path.read_text(), Loader=_Loader) if d is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, dict):
            raise ValueError(
                f"{path}: document {number} is not an object; it must have apiVersion, kind, metadata and spec"
            )
    return documents


def is_run(document: Document) -> bool:
    """Whether an object is, or is meant to be, a SailVLRun: its kind or its API group says so."""
    version = str(document.get("apiVersion", ""))
    return document.get("kind") == names.KIND or version.startswith(f"{names.GROUP}/")


class _Loader(yaml.SafeLoader):
    """Loads YAML as the clients of Kubernetes do: 2e-4 is a number, a date is a string, duplicate keys are an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # a class attribute of the base
        first: [(tag, pattern) for tag, pattern in known if tag not in ("tag:yaml.org,2002:timestamp",)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping. Raises ConstructorError for a duplicate key, which Kubernetes rejects too."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)
