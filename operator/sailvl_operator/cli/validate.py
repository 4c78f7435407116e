"""`sailvl validate FILE…`: the API server's errors, without a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sailvl_operator.api.validation import validate
from sailvl_operator.cli.documents import Document, is_ours, read_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="YAML or JSON; other kinds are passed over")


def run(args: argparse.Namespace) -> int:
    """0: all are good; 1: something is wrong; each error on a line of its own."""
    bad = sum(not _check_file(path) for path in args.files)
    return 1 if bad else 0


def _check_file(path: Path) -> bool:
    try:
        documents = read_all(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return False
    if not any(is_ours(document) for document in documents):
        print(f"{path}: holds no SailVLRun; write kind: SailVLRun", file=sys.stderr)
        return False
    return not sum(not _check(path, document) for document in documents)


def _check(path: Path, document: Document) -> bool:
    metadata = document.get("metadata")
    label = f"{path}: {metadata.get('name', '?') if isinstance(metadata, dict) else '?'}"
    if not is_ours(document):
        print(f"{label}: {document.get('kind', 'no kind')}, passed over")
        return True
    errors = validate(document)
    for error in errors:
        print(f"{label}: {error}", file=sys.stderr)
    if not errors:
        print(f"{label}: ok")
    return not errors
