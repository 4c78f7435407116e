"""`sailvl validate FILE…`: reports, without a cluster, the errors that the API server and the operator would report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sailvl_operator.api.validation import validate
from sailvl_operator.cli.documents import Document, is_run, read_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="YAML or JSON file; objects of other kinds are skipped"
    )


def run(args: argparse.Namespace) -> int:
    """Validate all files and print one error per line. Return 0 if all are valid, else 1."""
    invalid = sum(not _check_file(path) for path in args.files)
    return 1 if invalid else 0


def _check_file(path: Path) -> bool:
    try:
        documents = read_all(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return False
    if not any(is_run(document) for document in documents):
        print(f"{path}: no SailVLRun found; set kind: SailVLRun", file=sys.stderr)
        return False
    return not sum(not _check(path, document) for document in documents)


def _check(path: Path, document: Document) -> bool:
    metadata = document.get("metadata")
    label = f"{path}: {metadata.get('name', '?') if isinstance(metadata, dict) else '?'}"
    if not is_run(document):
        print(f"{label}: {document.get('kind', 'no kind')}, skipped")
        return True
    errors = validate(document)
    for error in errors:
        print(f"{label}: {error}", file=sys.stderr)
    if not errors:
        print(f"{label}: ok")
    return not errors
