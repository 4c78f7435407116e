"""`sailvl validate FILE…`: reports, without a cluster, the errors that the API server and the operator would report.

It reads YAML as the clients of Kubernetes do; `sailvl run` reads its file in this way, too.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from sailvl_operator.api import names
from sailvl_operator.api.allow_lists import AllowLists
from sailvl_operator.api.validation import validate
from sailvl_operator.errors import SettingsError
from sailvl_operator.options import add_allow_list_arguments, read_allow_lists

Document = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    add_allow_list_arguments(parser)
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="YAML or JSON file; objects of other kinds are skipped"
    )


def run(args: argparse.Namespace) -> int:
    """Validate all files and print one error per line.

    Return 0 if all are valid, 1 if one isn't, 2 for an invalid allow-list.
    """
    try:
        allowed = read_allow_lists(args)
    except SettingsError as error:
        print(f"sailvl validate: {error}", file=sys.stderr)
        return 2
    invalid = sum(not _check_file(path, allowed) for path in args.files)
    return 1 if invalid else 0


def _check_file(path: Path, allowed: AllowLists) -> bool:
    try:
        documents = read_all(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return False
    if not any(is_run(document) for document in documents):
        print(f"{path}: no SailVLRun found; set kind: SailVLRun", file=sys.stderr)
        return False
    return not sum(not _check(path, document, allowed) for document in documents)


def _check(path: Path, document: Document, allowed: AllowLists) -> bool:
    metadata = document.get("metadata")
    label = f"{path}: {metadata.get('name', '?') if isinstance(metadata, dict) else '?'}"
    if not is_run(document):
        print(f"{label}: {document.get('kind', 'no kind')}, skipped")
        return True
    errors = validate(document, allowed)
    for error in errors:
        print(f"{label}: {error}", file=sys.stderr)
    if not errors:
        print(f"{label}: ok")
    return not errors


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
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
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
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z"), list("-+.0123456789")
)
