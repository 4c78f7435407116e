"""`sailvl`: one command, a module a verb; heavy imports happen only for the verb that is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from importlib.metadata import version

VERBS = {
    "run": "carry a run out on this machine",
    "validate": "check files of runs without a server",
    "generate": "print the CustomResourceDefinition",
    "operator": "serve a cluster",
}


def main(argv: list[str] | None = None) -> int:
    """The console script; the exit status is the verb's."""
    parser = argparse.ArgumentParser(prog="sailvl", description="Train SAIL-VL vision-language models.")
    parser.add_argument("--version", action="version", version=f"sailvl {version('sailvl')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    asked = next((word for word in (sys.argv[1:] if argv is None else argv) if word in VERBS), None)
    for verb, words in VERBS.items():
        sub = verbs.add_parser(verb, help=words, description=words)
        if verb == asked:
            module = importlib.import_module(f"sailvl_operator.cli.{verb}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
