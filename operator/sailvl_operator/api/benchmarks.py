"""The benchmarks that SAIL-VL reports, by name, with their metric and the maximum number of tiles per image.

Source: arXiv 2501.05952, section on evaluation. Answers are decoded greedily. The groups are 7 General, 7 OCR, 2
Math&Knowledge and 2 Hallucination benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass

from sailvl_trainer.contract import Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A built-in benchmark."""

    metric: Metric
    """Metric that scores the answers."""
    group: str
    """Group over which scores are averaged."""
    max_tiles: int = 6
    """Maximum number of tiles per image."""
    scale: float = 100.0
    """Factor from the metric, which lies between 0 and 1, to the reported score, a percentage."""


def _general(metric: Metric, *, max_tiles: int = 6) -> Benchmark:
    return Benchmark(metric=metric, group="General", max_tiles=max_tiles)


def _ocr(metric: Metric, *, max_tiles: int = 6) -> Benchmark:
    return Benchmark(metric=metric, group="OCR", max_tiles=max_tiles)


BENCHMARKS = {
    "MMStar": _general("multiple_choice"),
    "MMBench": _general("multiple_choice"),
    "MMMU": _general("multiple_choice", max_tiles=12),
    "MME": _general("yes_no_f1"),
    "SEEDBench": _general("multiple_choice"),
    "RealWorldQA": _general("multiple_choice"),
    "MMVet": _general("exact_match"),
    "OCRBench": _ocr("exact_match", max_tiles=24),
    "DocVQA": _ocr("anls", max_tiles=18),
    "AI2D": _ocr("multiple_choice"),
    "InfoVQA": _ocr("anls", max_tiles=24),
    "ChartQA": _ocr("relaxed_accuracy", max_tiles=12),
    "TextVQA": _ocr("vqa_accuracy"),
    "OCRVQA": _ocr("exact_match", max_tiles=12),
    "MathVista": Benchmark(metric="exact_match", group="MathKnowledge"),
    "ScienceQA": Benchmark(metric="multiple_choice", group="MathKnowledge"),
    "POPE": Benchmark(metric="yes_no_f1", group="Hallucination"),
    "HallusionBench": Benchmark(metric="yes_no_f1", group="Hallucination"),
}
