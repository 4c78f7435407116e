"""Draw functions at random and print them without their bodies: name and docstring alone should say what they do."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from hack.source_report.sizes import parse

MIN_BODY_LINES = 4
"""Shorter functions are left out: their bodies say as much as their docstrings."""


def draw_functions(sources: Mapping[Path, str], count: int, seed: int) -> list[str]:
    """Return place, signature and docstring of `count` functions, the same ones for the same sources and seed."""
    functions = [text for path, source in sorted(sources.items()) for text in _hide_bodies(path, source)]
    return random.Random(seed).sample(functions, min(count, len(functions)))


def _hide_bodies(path: Path, source: str) -> Iterator[str]:
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            body = node.body[1:] if docstring else node.body
            if body and (body[-1].end_lineno or 0) - body[0].lineno + 1 >= MIN_BODY_LINES:
                kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
                returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                signature = f"{kind} {node.name}({ast.unparse(node.args)}){returns}"
                yield f"{path}:{node.lineno}\n    {signature}\n" + _indent(docstring or "(no docstring)")


def _indent(text: str) -> str:
    return "\n".join(f"        {line}".rstrip() for line in text.splitlines())
