"""Reports for people: pages that stand alone in one file, in one style; called by curation and evaluation."""

from __future__ import annotations

from typing import Any

import jinja2


def render(template: str, **values: Any) -> bytes:
    """A page; `template`: its path in this package, extending page.html.jinja; a missing value raises."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sailvl_trainer", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values).encode()
