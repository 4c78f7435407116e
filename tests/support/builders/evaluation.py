"""Builders for tests of evaluation: images, benchmark files, and a stage with an untrained model."""

from __future__ import annotations

import base64
import csv
import io
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from sailvl_trainer.contract import BenchmarkConfig, EvaluateConfig, Metric, ModelConfig, Stage
from sailvl_trainer.model.build import build_model
from sailvl_trainer.model.export import export_model
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "pink")


@cache
def draw_colour(colour: str) -> bytes:
    """Draw a PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def encode_base64(data: bytes) -> str:
    """Encode an image as a TSV holds it."""
    return base64.b64encode(data).decode()


def write_tsv(path: Path, rows: list[dict[str, Any]], *, encoding: str = "utf-8") -> Path:
    """Write a benchmark as VLMEvalKit's tools do, with the columns of all rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_questions(path: Path, number: int = 7) -> Path:
    """Write a benchmark of questions about colours, of different lengths; the last one has no image."""
    rows = [
        {
            "index": i,
            "image": encode_base64(draw_colour(colour)) if i < number - 1 else "",
            "question": "What colour is " + "really " * i + "this?",
            "answer": colour,
        }
        for i, colour in enumerate(COLOURS[:number])
    ]
    return write_tsv(path, rows)


def build_row(**cells: str) -> dict[str, str]:
    """Build a valid row of a benchmark and replace or add the given cells."""
    image = encode_base64(draw_colour("red"))
    return {"index": "0", "image": image, "question": "What colour?", "answer": "red"} | cells


def build_benchmark(path: Path, metric: Metric = "exact_match", **fields: Any) -> BenchmarkConfig:
    """Build the configuration of a benchmark whose score is in percent."""
    defaults: dict[str, Any] = {"name": path.stem, "group": "Custom", "max_tiles": 1, "scale": 100.0}
    return BenchmarkConfig(path=str(path), metric=metric, **(defaults | fields))


def build_stage(
    root: Path, *benchmarks: BenchmarkConfig, run: str = "demo", attempt: int = 1, **settings: Any
) -> Stage:
    """Build a stage that evaluates the model of `export_untrained` below `root`."""
    defaults: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 4}
    return Stage(
        namespace="team",
        run=run,
        stage="evaluate",
        kind="evaluate",
        attempt=attempt,
        digest=f"digest-of-{run}",
        storage=str(root),
        output=str(root / run / "evaluate"),
        model=ModelConfig(preset="tiny"),
        init_from=str(root / "model"),
        evaluate=EvaluateConfig(benchmarks=benchmarks, **(defaults | settings)),
    )


def export_untrained(root: Path) -> Path:
    """Export a model of random weights below `root`, where `build_stage` expects it; return `root`."""
    config = ModelConfig(preset="tiny")
    tokenizer = load_tokenizer(config)
    model = build_model(config, tokenizer, init_from=None, seed=0)
    export_model(model, tokenizer, get_preset("tiny"), root / "model" / "export")
    return root
