"""`sailvl run --local FILE --root DIR`: executes a run on this machine, with progress bars and a summary table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from sailvl_operator.api.parse import SpecError, parse_run
from sailvl_operator.api.status import ConditionType, StageStatus, Status
from sailvl_operator.api.validation import validate
from sailvl_operator.cli.validate import read_documents
from sailvl_operator.core.decision import Event
from sailvl_operator.core.units import format_duration, parse_time
from sailvl_operator.local import LocalRun, LocalStateError, LockedError, parse_local

PLAIN_WIDTH = 120
"""Width of the output in characters if it is not a terminal."""
SHOWN = ("loss", "heldOutLoss", "score", "kept")
"""Metrics that are shown beside the progress bar of a stage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("file", type=Path, help="YAML file with one SailVLRun")
    parser.add_argument("--local", action="store_true", required=True, help="execute the run on this machine; required")
    parser.add_argument(
        "--root", type=Path, default=Path("sailvl-data"), help="directory that serves as /data (default ./sailvl-data)"
    )


def run(args: argparse.Namespace) -> int:
    """Execute the run. Return 0 if it succeeded, 1 if it failed, 2 if the file is invalid, 130 on an interrupt."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        (document, *more) = read_documents(args.file)
        if more:
            raise ValueError(f"{args.file}: {1 + len(more)} runs found; the file must contain exactly one")
        if errors := validate(document):
            raise ValueError("\n".join(f"{args.file}: {error}" for error in errors))
        local = LocalRun(parse_local(document, parse_run), args.root)
        with Display(console) as display:
            status = local.run_to_completion(display.show)
    except (ValueError, SpecError, LockedError, LocalStateError) as error:
        print(f"sailvl run: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; repeat the command to resume from the last checkpoint")
        return 130
    console.print(build_table(status))
    return _conclude(console, local, status)


class Display:
    """Prints one line per event and shows one progress bar per stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.fields[name]:12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, status: Status, events: tuple[Event, ...]) -> None:
        """Print the events and update the progress bars."""
        for event in events:
            self._console.print(event.message, highlight=False, style="red" if event.type == "Warning" else "")
        for stage in status.stages:
            if stage.state != "Pending":
                self._show_stage(stage)

    def _show_stage(self, stage: StageStatus) -> None:
        if stage.name not in self._tasks:
            self._tasks[stage.name] = self._progress.add_task("", name=stage.name, metrics="", total=None)
        total = stage.progress.steps or None if stage.progress is not None else None
        done = stage.progress.step if stage.progress is not None else 0
        metrics = "  ".join(f"{name} {stage.metrics[name]}" for name in SHOWN if name in stage.metrics)
        self._progress.update(self._tasks[stage.name], total=total, completed=done, metrics=metrics)


def build_table(status: Status) -> Table:
    """Build the summary table with the duration and the metrics of each stage."""
    table = Table("Stage", "State", "Time", "Steps", "Tokens", "Held-out loss", "Shuffled", "Score", "Attempts")
    for stage in status.stages:
        seconds = parse_time(stage.completion_time) - parse_time(stage.start_time) if stage.completion_time else None
        progress = stage.progress
        table.add_row(
            stage.name,
            stage.state + (", reused" if stage.reused else ""),
            "" if seconds is None else format_duration(seconds),
            str(progress.step) if progress else "",
            str(progress.tokens) if progress and progress.tokens else "",
            " → ".join(_round(stage, name) for name in ("heldOutLossBefore", "heldOutLoss") if name in stage.metrics),
            _round(stage, "heldOutLossShuffled"),
            _round(stage, "score"),
            str(stage.attempt),
        )
    return table


def _round(stage: StageStatus, metric: str) -> str:
    """Format a metric with two decimals; empty if the stage does not have it."""
    return f"{float(stage.metrics[metric]):.2f}" if metric in stage.metrics else ""


def _conclude(console: Console, local: LocalRun, status: Status) -> int:
    for stage in status.stages:
        page = local.root / stage.output / "report" / "index.html"
        if stage.output and page.exists():
            console.print(f"report of {stage.name}: {page}", highlight=False, soft_wrap=True)
    if status.is_true(ConditionType.SUCCEEDED):
        return 0
    failed = status.condition(ConditionType.FAILED)
    print(f"sailvl run: {failed.message if failed else 'not finished'}", file=sys.stderr)
    print(f"worker logs are in {local.folder / 'workers'}", file=sys.stderr)
    return 1
