"""`sailvl operator`: runs the operator of a cluster until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys

import uvloop

from sailvl_operator.api.untrusted import allow_deep_objects
from sailvl_operator.app import App
from sailvl_operator.cluster.credentials import load_credentials
from sailvl_operator.errors import OperatorError
from sailvl_operator.logs import configure_logging
from sailvl_operator.options import OPTIONS, find_empty_allow_lists, read_settings
from sailvl_operator.settings import describe

log = logging.getLogger("sailvl_operator")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag per option."""
    for option in OPTIONS:
        parser.add_argument(option.flag, help=f"{option.help} (or {option.variable})", default=None)


def run(args: argparse.Namespace) -> int:
    """Run the operator. Return 0 after a signal, 1 after an error or the loss of the Lease, 2 for invalid settings."""
    try:
        settings = read_settings(args, os.environ)
        configure_logging(settings.log_level, settings.log_format)
        credentials = load_credentials(settings.api.kubeconfig, settings.api.context)
    except OperatorError as error:
        print(f"sailvl operator: {error}", file=sys.stderr)
        return 2
    log.info("starting", extra={"settings": describe(settings), "server": credentials.server})
    for flag in find_empty_allow_lists(args, os.environ):
        log.warning("%s is set, but empty, so it allows everything; add entries, or leave the flag out", flag)
    code = 0
    _tune_gc()
    allow_deep_objects()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(App(settings, credentials).serve())
    except* OperatorError as group:
        log.error("shutting down: %s", _format_errors(group))
        code = 1
    return code


def _tune_gc() -> None:
    """Freeze imported objects and run the cyclic garbage collector rarely; reference counting frees almost
    everything."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _format_errors(error: BaseException) -> str:
    """Format the errors of nested exception groups on one line."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_format_errors(inner) for inner in error.exceptions)
    return f"{type(error).__name__}: {error}"
