"""Measure files, functions and classes of Python sources with the standard library's parser."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median, quantiles

SHORT_FILE_LINES = 40
NOT_HELPERS = {"__init__.py", "conftest.py"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A function or method, nested ones included."""

    name: str
    path: Path
    line: int
    lines: int
    """From `def` to the last line; decorators don't count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the files below one folder."""

    files: int
    """Modules other than `__init__.py`; the other figures leave these out as well."""
    lines: int
    median_file: float
    longest_file: int
    short_files: int
    """Files of less than SHORT_FILE_LINES lines."""
    functions: int
    median_function: float
    p90_function: float
    longest_function: int


def find_sources(folder: Path) -> list[Path]:
    """Return the Python files below a folder, in a stable order."""
    return sorted(folder.rglob("*.py"))


@cache
def parse(source: str) -> ast.Module:
    """Parse a source once, whatever is measured of it."""
    return ast.parse(source)


def collect_functions(path: Path, source: str) -> Iterator[Function]:
    """Yield the functions of one file."""
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(name=node.name, path=path, line=node.lineno, lines=lines)


def measure(sources: Mapping[Path, str]) -> Sizes:
    """Measure files, given their text by path; at least one file and two functions are needed."""
    modules = {path: text for path, text in sources.items() if path.name != "__init__.py"}
    files = [len(text.splitlines()) for text in modules.values()]
    functions = [f.lines for path, text in modules.items() for f in collect_functions(path, text)]
    return Sizes(
        files=len(files),
        lines=sum(files),
        median_file=median(files),
        longest_file=max(files),
        short_files=sum(lines < SHORT_FILE_LINES for lines in files),
        functions=len(functions),
        median_function=median(functions),
        p90_function=quantiles(functions, n=10, method="inclusive")[-1],
        longest_function=max(functions),
    )


def find_duplicate_classes(sources: Mapping[Path, str]) -> dict[str, list[str]]:
    """Return the names of top-level classes that several files define, with `file:line` of each."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, text in sources.items():
        for node in parse(text).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    return {name: found for name, found in sorted(places.items()) if len(found) > 1}


def find_test_helpers(files: Iterable[Path]) -> list[Path]:
    """Return those of the files directly below tests/ that tests would import as top-level modules."""
    return [path for path in files if path.suffix == ".py" and path.name not in NOT_HELPERS]
