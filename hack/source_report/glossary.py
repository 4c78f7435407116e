"""Read docs/glossary.md: the project's terms and the words that it refuses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Scope = Literal[
    "names and docstrings", "names", "whole names", "function names", "docstrings", "docstring openings", "strings"
]
"""Where a word is refused. A whole name is an identifier without its leading underscores. Words that are refused in
docstrings are refused in comments, too."""

TERMS_HEADER = ["Term", "Means", "Not"]
REFUSED_HEADER = ["Refused", "Where", "Instead"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusedWord:
    """A word or phrase of the glossary that the sources may not use."""

    word: str
    scope: Scope
    instead: str
    """The term to use, as the glossary writes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Glossary:
    """The parsed glossary."""

    terms: tuple[str, ...]
    refused: tuple[RefusedWord, ...]
    problems: tuple[str, ...]
    """Malformed rows, empty cells, and terms or words that are listed twice."""


def read_glossary(path: Path) -> Glossary:
    """Parse a glossary file."""
    return parse_glossary(path.read_text(encoding="utf-8"))


def parse_glossary(text: str) -> Glossary:
    """Parse the tables `Term, Means, Not` and `Refused, Where, Instead`; other text is ignored.

    A word in bold in the column `Not` is refused in names and docstrings. Words without bold are advice.
    """
    terms: list[str] = []
    refused: list[RefusedWord] = []
    problems: list[str] = []
    for number, header, row in _read_rows(text):
        problem, words = "", []
        if header not in (TERMS_HEADER, REFUSED_HEADER):
            problem = f"unknown table header {header}"
        elif len(row) != len(header) or not all(row[:2]):
            problem = f"expected {len(header)} cells, the first two not empty, got {row}"
        elif header == TERMS_HEADER:
            words = _find_bold(row)
            terms.append(row[0])
        else:
            words, problem = _parse_refused_row(row)
        refused += words
        problems += [f"line {number}: {problem}"] if problem else []
    problems += _find_conflicts(terms, refused)
    return Glossary(terms=tuple(terms), refused=tuple(refused), problems=tuple(problems))


def _read_rows(text: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield line number, header and cells of every row of every table."""
    header: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif not set(line) <= set("|-: "):
            yield number, header, cells


def _find_bold(row: list[str]) -> list[RefusedWord]:
    """Return the words in bold of a row of the table `Term, Means, Not`."""
    bold = re.findall(r"\*\*(.+?)\*\*", row[2])
    return [RefusedWord(word=word, scope="names and docstrings", instead=row[0]) for word in bold]


def _parse_refused_row(cells: list[str]) -> tuple[list[RefusedWord], str]:
    """Return the words of a row of the table `Refused, Where, Instead`, and what is wrong with the row."""
    words = re.findall(r"`([^`]+)`", cells[0])
    scope = next((scope for scope in get_args(Scope) if scope == cells[1]), None)
    if scope is None:
        return [], f"unknown scope {cells[1]!r}; use one of {get_args(Scope)}"
    if not words or not cells[2]:
        return [], "expected words in backticks and what to say instead"
    return [RefusedWord(word=word, scope=scope, instead=cells[2]) for word in words], ""


def _find_conflicts(terms: list[str], refused: list[RefusedWord]) -> list[str]:
    repeated_terms = [term for term, count in Counter(terms).items() if count > 1]
    repeated_words = [key for key, count in Counter((r.word, r.scope) for r in refused).items() if count > 1]
    single_terms = {part.strip() for term in terms for part in term.split(",")}
    return [
        *(f"term {term!r} is listed twice" for term in repeated_terms),
        *(f"{word!r} is refused twice in {scope}" for word, scope in repeated_words),
        *(f"{r.word!r} is both a term and refused" for r in refused if r.word in single_terms),
    ]
