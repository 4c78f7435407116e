"""The history of benchmark figures: one JSON line per run of a benchmark, appended by the scripts of this folder.

`make bench-plot` draws every figure over the recorded runs into build/bench/history.png. Figures of machines with
different numbers of cores are drawn as separate lines, because they can't be compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "bench/history.jsonl"
PLOT = ROOT / "build/bench/history.png"
_COLUMNS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The figures of one run of one benchmark."""

    date: str
    """Day of the run in UTC, as YYYY-MM-DD."""
    commit: str
    """Abbreviated hash of the commit, with the suffix `-dirty` if tracked files were changed."""
    cores: int
    """CPU cores that the benchmark could use."""
    benchmark: str
    """Name of the benchmark, such as `operator`."""
    figures: dict[str, float]
    """Values by name; a name ends in its unit, such as `_s` or `_mib`."""


def append_record(benchmark: str, figures: Mapping[str, float], *, path: Path = HISTORY) -> Record:
    """Append the figures of a run that has just ended, and return the record."""
    record = Record(
        date=datetime.now(UTC).date().isoformat(),
        commit=_describe_commit(),
        cores=len(os.sched_getaffinity(0)),
        benchmark=benchmark,
        figures=dict(figures),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")
    return record


def read_records(path: Path = HISTORY) -> list[Record]:
    """Return the records in the order in which they were written; an empty list if there is no file.

    Raises ValueError that names the line which is not a record.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(Record(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a record of a benchmark ({error}); correct or remove it") from error
    return records


def group_series(records: Sequence[Record]) -> dict[str, dict[int, list[tuple[str, float]]]]:
    """Return the points (date and commit, value) in the order of the records, by `benchmark: figure` and cores."""
    series: dict[str, dict[int, list[tuple[str, float]]]] = {}
    for record in records:
        for name, value in record.figures.items():
            by_cores = series.setdefault(f"{record.benchmark}: {name}", {})
            by_cores.setdefault(record.cores, []).append((f"{record.date}\n{record.commit}", value))
    return series


def plot_history(records: Sequence[Record], path: Path) -> None:
    """Draw one panel per figure, with a line per number of cores."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    series = group_series(records)
    rows = -(-len(series) // _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(5 * _COLUMNS, 3 * rows), squeeze=False)
    for ax in axes.flat[len(series) :]:
        ax.set_axis_off()
    for ax, (title, by_cores) in zip(axes.flat, series.items(), strict=False):
        for cores, points in sorted(by_cores.items()):
            ax.plot([label for label, _ in points], [value for _, value in points], "o-", label=f"{cores} cores")
        ax.set_title(title, fontsize=9)
        ax.set_ylim(bottom=0)
        ax.tick_params(labelsize=7)
        ax.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _describe_commit() -> str:
    """Return the commit's abbreviated hash, or `unknown` outside of a git checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=7", "--dirty"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Plot the whole history; exit with status 1 if it is empty."""
    records = read_records()
    if not records:
        sys.exit(f"{HISTORY} has no records; run make bench or make bench-operator first")
    plot_history(records, PLOT)
    print(PLOT)


if __name__ == "__main__":
    main()
