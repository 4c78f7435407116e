"""The report of a curate stage: report.json for programs, index.html with plots and pictures for people."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image

from sailvl_trainer.data.images import open_image
from sailvl_trainer.data.shards import ShardReader, read_manifest
from sailvl_trainer.runtime.documents import encode, write_atomic

mpl.use("Agg")
PICTURES = 24
THUMBNAIL = 160
"""Pixels of a picture's longer side in the gallery."""


def write(output: Path, folder: Path) -> None:
    """Both files, from the parts and the shards of a finished stage."""
    rows = pq.read_table(output / "parts" / "rows").to_pylist()
    repeats = json.loads((output / "parts" / "repeats.json").read_bytes())
    for row in rows:
        row["outcome"] = repeats.get(str(row["item"]), [row["outcome"]])[0]
    facts = summarise(rows)
    write_atomic(folder / "report.json", encode(facts))
    page = jinja2.Template((files("sailvl_trainer.curate") / "report.html.jinja").read_text(), autoescape=True)
    html = page.render(facts=facts, plots=_plots(rows), pictures=_pictures(output / "shards"))
    write_atomic(folder / "index.html", html.encode())


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by outcome and source, and the vocabulary of what was kept."""
    kept = [row for row in rows if row["outcome"] == "ok"]
    words = [row["caption"].lower().split() for row in kept]
    return {
        "samples": len(rows),
        "kept": len(kept),
        "outcomes": dict(Counter(row["outcome"] for row in rows).most_common()),
        "sources": {
            source: dict(Counter(r["outcome"] for r in rows if r["source"] == source).most_common())
            for source in sorted({row["source"] for row in rows})
        },
        "caption": {
            "meanWords": round(sum(map(len, words)) / max(1, len(words)), 2),
            "unigrams": len({w for caption in words for w in caption}),
            "bigrams": len({pair for caption in words for pair in pairwise(caption)}),
            "frequent": Counter(w for caption in words for w in caption).most_common(20),
        },
    }


def _plots(rows: list[dict[str, Any]]) -> dict[str, str]:
    kept = [row for row in rows if row["outcome"] == "ok"]
    return {
        "Words a caption": _histogram([len(row["caption"].split()) for row in kept], "words"),
        "Longer side": _histogram([max(row["width"], row["height"]) for row in kept], "pixels"),
        "Aspect ratio": _histogram([row["width"] / row["height"] for row in kept], "width / height"),
    }


def _histogram(values: list[float], label: str) -> str:
    figure = Figure(figsize=(4, 2.4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(values, bins=min(30, max(1, len(set(values)))), color="#3b6ea8")
    axes.set_xlabel(label)
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _pictures(shards: Path) -> list[dict[str, str]]:
    """Some kept samples, spread evenly over the first shard."""
    reader = ShardReader(shards, read_manifest(shards).shards[0].name)
    stride = max(1, len(reader) // PICTURES)
    return [_picture(reader, row) for row in range(0, len(reader), stride)][:PICTURES]


def _picture(reader: ShardReader, row: int) -> dict[str, str]:
    sample = reader.sample(row)
    assert sample.image is not None, "curated samples have pictures"
    image = open_image(sample.image)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return {"caption": str(sample.meta["caption"]), "data": base64.b64encode(buffer.getvalue()).decode()}
