"""The command `sailvl`. Each subcommand is a module that is imported only when the subcommand is used."""

from __future__ import annotations

import argparse
import importlib
import sys
from importlib.metadata import version
from types import ModuleType

VERBS = {
    "run": "execute a run on this machine",
    "validate": "validate files of runs without a cluster",
    "generate": "print the CustomResourceDefinition or its reference",
    "operator": "run the operator",
}
"""Help text by subcommand. Each is a module of this package with add_arguments(parser) and run(args) -> exit status."""


def main(argv: list[str] | None = None) -> int:
    """Run the console script and return the exit status of the subcommand."""
    arguments = sys.argv[1:] if argv is None else argv
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        args = build_parser(verb).parse_args(arguments)
        status: int = args.run(args)
    except ModuleNotFoundError as error:
        return _report_missing(verb, error)
    return status


def build_parser(selected: str | None) -> argparse.ArgumentParser:
    """Build the parser with all subcommands and the flags of the selected one.

    Raises ModuleNotFoundError if a package that the selected subcommand needs is not installed.
    """
    parser = argparse.ArgumentParser(prog="sailvl", description="Train SAIL-VL vision-language models.")
    parser.add_argument("--version", action="version", version=f"sailvl {version('sailvl')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, description in VERBS.items():
        sub = verbs.add_parser(verb, help=description, description=description)
        if verb == selected:
            module = load_verb(verb)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def load_verb(verb: str) -> ModuleType:
    """Import the module of a subcommand with all its dependencies."""
    return importlib.import_module(f"sailvl_operator.cli.{verb}")


def _report_missing(verb: str | None, error: ModuleNotFoundError) -> int:
    """Report a missing third-party package as an extra to install; raise if a module of this project is missing."""
    if error.name is None or error.name.split(".")[0] in ("sailvl_operator", "sailvl_trainer"):
        raise error
    print(f"sailvl {verb}: {error.name} is not installed; pip install 'sailvl[operator]'", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
