"""`sailvl`: one command, a module a verb; heavy imports happen only for the verb that is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from importlib.metadata import version
from types import ModuleType

VERBS = {
    "run": "carry a run out on this machine",
    "validate": "check files of runs without a server",
    "generate": "print the CustomResourceDefinition or its reference",
    "operator": "serve a cluster",
}
"""Each is the module of its name in this package, with add_arguments(parser) and run(args) -> exit status."""


def main(argv: list[str] | None = None) -> int:
    """The console script; the exit status is the verb's."""
    words = sys.argv[1:] if argv is None else argv
    asked = next((word for word in words if not word.startswith("-")), None)
    try:
        args = build_parser(asked).parse_args(words)
        status: int = args.run(args)
    except ModuleNotFoundError as error:
        return _refuse_missing(asked, error)
    return status


def build_parser(asked: str | None) -> argparse.ArgumentParser:
    """All verbs, and the flags of the one asked for. Raises ModuleNotFoundError where its packages are missing."""
    parser = argparse.ArgumentParser(prog="sailvl", description="Train SAIL-VL vision-language models.")
    parser.add_argument("--version", action="version", version=f"sailvl {version('sailvl')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, words in VERBS.items():
        sub = verbs.add_parser(verb, help=words, description=words)
        if verb == asked:
            module = load_verb(verb)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def load_verb(verb: str) -> ModuleType:
    """The verb's module, with everything that it imports."""
    return importlib.import_module(f"sailvl_operator.cli.{verb}")


def _refuse_missing(verb: str | None, error: ModuleNotFoundError) -> int:
    """One of our own modules missing is a fault of ours, anybody else's an extra that isn't installed."""
    if error.name is None or error.name.split(".")[0] in ("sailvl_operator", "sailvl_trainer"):
        raise error
    print(f"sailvl {verb}: {error.name} is not installed; pip install 'sailvl[operator]'", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
