"""`sailvl generate`: prints the files that are generated from the types. `make generate` writes them into the tree."""

from __future__ import annotations

import argparse
import sys

import yaml

from sailvl_operator.api.crd import build_crd
from sailvl_operator.api.reference import build_reference

HEADER = "# Generated from the types by `make generate`; do not edit.\n"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        """Disable YAML anchors for schemas that are used more than once."""
        return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("file", choices=GENERATORS, help="file to print")


def run(args: argparse.Namespace) -> int:
    """Print the generated file and return 0."""
    sys.stdout.write(GENERATORS[args.file]())
    return 0


def dump_crd() -> str:
    """Return the text of crds/sailvlruns.yaml."""
    return HEADER + yaml.dump(build_crd(), Dumper=_Dumper, sort_keys=False, width=120)


GENERATORS = {"crd": dump_crd, "reference": build_reference}
