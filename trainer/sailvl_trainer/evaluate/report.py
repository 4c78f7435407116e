"""The evaluation as a page for people: a bar a benchmark, and answers right and wrong."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from sailvl_trainer.runtime.documents import write_atomic

SHOWN = 12
"""Answers a benchmark in the gallery."""


def write(folder: Path, scored: list[dict[str, Any]], metrics: dict[str, float]) -> None:
    """index.html from the scored benchmarks."""
    template = (files("sailvl_trainer.evaluate") / "report.html.jinja").read_text()
    page = jinja2.Template(template, autoescape=True).render(scored=scored, metrics=metrics, shown=SHOWN)
    write_atomic(folder / "index.html", page.encode())
