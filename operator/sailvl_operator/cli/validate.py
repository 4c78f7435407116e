"""`sailvl validate FILE…`: the API server's errors, without a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sailvl_operator.api.validation import validate
from sailvl_operator.cli.documents import read_documents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """0: all are good; 1: something is wrong; each error on a line of its own."""
    bad = 0
    for path in args.files:
        bad += _check(path)
    return 1 if bad else 0


def _check(path: Path) -> int:
    try:
        documents = read_documents(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    bad = 0
    for document in documents:
        name = (document.get("metadata") or {}).get("name", "?")
        errors = validate(document)
        for wrong in errors:
            print(f"{path}: {name}: {wrong}", file=sys.stderr)
        if not errors:
            print(f"{path}: {name}: ok")
        bad += bool(errors)
    return bad
