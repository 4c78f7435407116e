"""`sailvl generate`: what is made from the types; `make generate` writes it into the tree."""

from __future__ import annotations

import argparse
import sys

import yaml

from sailvl_operator.api.crd import build_crd
from sailvl_operator.api.reference import build_reference

HEADER = "# Generated from the types by `make generate`; do not edit.\n"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        """Manifests hold no anchors, however often a schema is used."""
        return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("what", choices=WHAT, help="what to print")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    sys.stdout.write(WHAT[args.what]())
    return 0


def dump_crd() -> str:
    """crds/sailvlruns.yaml."""
    return HEADER + yaml.dump(build_crd(), Dumper=_Dumper, sort_keys=False, width=120)


WHAT = {"crd": dump_crd, "reference": build_reference}
