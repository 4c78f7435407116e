"""Find refused words in the names, docstrings, comments and strings of Python sources."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from hack.source_report.glossary import RefusedWord, Scope
from hack.source_report.sizes import parse


@dataclass(frozen=True, kw_only=True, slots=True)
class Name:
    """One place where a source binds an identifier."""

    identifier: str
    line: int
    is_function: bool = False


TextKind = Literal["docstring", "comment", "string"]
Kind = Literal["name", "docstring", "opening", "comment", "string"]
"""Where a refused word was found; an opening is the first word of a docstring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A docstring of a module, class, function or attribute; a comment; or another string."""

    kind: TextKind
    text: str
    line: int
    prose: str
    """The text with blanks in place of code in backticks, of the same length."""
    tokens: frozenset[str]
    """The words of the prose, in lower case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Occurrence:
    """A refused word in a source."""

    path: Path
    line: int
    subject: str
    """The name, or an extract of the text, that contains the word."""
    refused: RefusedWord
    kind: Kind

    def __str__(self) -> str:
        """Return a message in the form of a compiler's: file, line, problem, remedy."""
        kind = "docstring" if self.kind == "opening" else self.kind
        subject = f"name `{self.subject}`" if kind == "name" else f'{kind} "{self.subject}"'
        word, instead = self.refused.word, self.refused.instead
        return f"{self.path}:{self.line}: {subject} uses refused word `{word}`; the glossary says `{instead}`"


_SEARCHED_TEXTS: dict[Scope, tuple[TextKind, ...]] = {
    "names and docstrings": ("docstring", "comment"),
    "docstrings": ("docstring", "comment"),
    "docstring openings": ("docstring",),
    "strings": ("string",),
}
"""Texts in which a word of a scope is refused; the other scopes concern names alone."""


def find_refused(path: Path, source: str, refused: Iterable[RefusedWord]) -> list[Occurrence]:
    """Return every use of a refused word in one file, in the order of lines."""
    tree = parse(source)
    names = [Name(identifier=path.stem, line=1), *collect_names(tree)]
    texts = [*collect_strings(tree), *collect_comments(source)]
    found: list[Occurrence] = []
    parts = {part for name in names for part in split_identifier(name.identifier)}
    tokens = {token for text in texts for token in text.tokens}
    for word in refused:
        forms = inflect(word.word.lower().strip("_").split()[0])
        if not parts.isdisjoint(forms):
            found += _find_in_names(path, names, word)
        if not tokens.isdisjoint(forms):
            found += _find_in_texts(path, texts, word)
    return sorted(found, key=lambda occurrence: (occurrence.line, occurrence.refused.word))


def _find_in_names(path: Path, names: Iterable[Name], refused: RefusedWord) -> Iterator[Occurrence]:
    if refused.scope not in ("docstrings", "docstring openings", "strings"):
        for name in names:
            if is_refused_name(name.identifier, refused.word, refused.scope, is_function=name.is_function):
                yield Occurrence(path=path, line=name.line, subject=name.identifier, refused=refused, kind="name")


def _find_in_texts(path: Path, texts: Iterable[Text], refused: RefusedWord) -> Iterator[Occurrence]:
    kinds = _SEARCHED_TEXTS.get(refused.scope, ())
    is_opening = refused.scope == "docstring openings"
    for text in texts:
        if text.kind in kinds:
            for line, extract in find_in_text(text, refused.word, refused.scope):
                kind: Kind = "opening" if is_opening else text.kind
                yield Occurrence(path=path, line=line, subject=extract, refused=refused, kind=kind)


def collect_names(tree: ast.AST) -> Iterator[Name]:
    """Yield the identifiers that a module binds: classes, functions, parameters, attributes, variables, aliases."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield Name(identifier=name, line=node.lineno, is_function=True)
            case ast.ClassDef(name=name):
                yield Name(identifier=name, line=node.lineno)
            case ast.arg(arg=name):
                yield Name(identifier=name, line=node.lineno)
            case ast.Name(id=name, ctx=ast.Store()):
                yield Name(identifier=name, line=node.lineno)
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield Name(identifier=name, line=node.lineno)
            case ast.alias(asname=str(name)):
                yield Name(identifier=name, line=node.lineno)


def collect_strings(tree: ast.AST) -> Iterator[Text]:
    """Yield all strings; one that is a statement is a docstring, which includes those of attributes."""
    statements: set[int] = set()
    for node in ast.walk(tree):  # which comes to a statement before its value
        if isinstance(node, ast.Expr):
            statements.add(id(node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield _build_text("docstring" if id(node) in statements else "string", node.value, node.lineno)


def collect_comments(source: str) -> Iterator[Text]:
    """Yield the comments; those on consecutive lines are one text."""
    lines: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if lines and token.start[0] != last + 1:
                yield _build_text("comment", "\n".join(lines), last + 1 - len(lines))
                lines = []
            lines.append(token.string.lstrip("#"))
            last = token.start[0]
    if lines:
        yield _build_text("comment", "\n".join(lines), last + 1 - len(lines))


def _build_text(kind: TextKind, text: str, line: int) -> Text:
    prose = re.sub(r"`[^`]*`", lambda code: " " * len(code[0]), text)
    return Text(kind=kind, text=text, line=line, prose=prose, tokens=frozenset(re.findall(r"\w+", prose.lower())))


@cache
def is_refused_name(identifier: str, word: str, scope: Scope, *, is_function: bool) -> bool:
    """Whether an identifier contains a refused word, or is one if the scope is that of whole names.

    A refused word with underscores at both ends, as `_a_`, is refused inside snake-case names only.
    """
    if word.startswith("_") and word.endswith("_"):
        return word in identifier.strip("_")
    parts, refused = split_identifier(identifier), word.lower().split()
    if scope in ("whole names", "function names"):
        return parts == refused and (is_function or scope == "whole names")
    size, forms = len(refused), inflect(refused[0])
    return any(part in forms and parts[at + 1 : at + size] == refused[1:] for at, part in enumerate(parts))


def find_in_text(text: Text, word: str, scope: Scope) -> Iterator[tuple[int, str]]:
    """Yield line and extract of each use of a word in the prose of a text."""
    if text.tokens.isdisjoint(inflect(word.lower().split()[0])):
        return
    pattern = _compile_opening(word) if scope == "docstring openings" else _compile_pattern(word)
    for match in pattern.finditer(text.prose):
        line = text.line + text.prose.count("\n", 0, match.start())
        extract = text.text[max(0, match.start() - 20) : match.end() + 20]
        yield line, " ".join(extract.split())


@cache
def _compile_opening(word: str) -> re.Pattern[str]:
    return re.compile(rf"\A\s*{re.escape(word)}(?!\w)")


@cache
def _compile_pattern(word: str) -> re.Pattern[str]:
    first, *others = word.lower().split()
    forms = "|".join(sorted(inflect(first), key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{forms})" + "".join(rf"\s+{other}" for other in others) + r"(?!\w)", re.I)


@cache
def split_identifier(identifier: str) -> list[str]:
    """Split a snake-case or camel-case identifier in words of lower case."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)]


@cache
def inflect(word: str) -> frozenset[str]:
    """Return a word with its regular endings, as a verb and as a noun."""
    endings = ("", "s", "es", "d", "ed", "ing", "ly")
    stems = [word[:-1]] if word.endswith("e") else [word[:-1] + "i"] if word.endswith("y") else []
    return frozenset([word + e for e in endings] + [stem + e for stem in stems for e in ("es", "ed", "ing")])
