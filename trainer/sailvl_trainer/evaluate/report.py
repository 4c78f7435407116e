"""The report of an evaluate stage: scores.json and predictions.jsonl for programs, index.html for people.

Called by stage.py on the first rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from sailvl_trainer.evaluate.benchmark import Answer, BenchmarkResult
from sailvl_trainer.evaluate.tsv import read_tsv
from sailvl_trainer.reporting import encode_thumbnail, render_page
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.files import write_atomic
from sailvl_trainer.storage.layout import StageFiles

MAX_CARDS = 6
"""Maximum number of correct and of incorrect answers shown per benchmark."""
METRIC_LABELS = {
    "multiple_choice": "multiple choice",
    "exact_match": "exact match",
    "vqa_accuracy": "VQA accuracy",
    "relaxed_accuracy": "relaxed accuracy",
    "anls": "ANLS",
    "yes_no_f1": "F1 of yes",
    "caption_loss": "nats per token, lower is better",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerCard:
    """An answer as the report shows it."""

    answer: Answer
    thumbnail: str
    """JPEG in base64; empty if the question has no image or it can't be displayed."""


def write_report(
    files: StageFiles, results: list[BenchmarkResult], metrics: dict[str, float], *, model: str, limit: int
) -> None:
    """Write all three files. `model`: path of the evaluated model. `limit`: number of questions used; 0: all."""
    folder = files.report
    lines = (
        encode({"benchmark": result.benchmark.name} | asdict(answer)) for result in results for answer in result.answers
    )
    write_atomic(folder / "predictions.jsonl", b"\n".join([*lines, b""]))
    groups: dict[str, list[BenchmarkResult]] = {}
    for result in results:
        if not result.is_loss:
            groups.setdefault(result.benchmark.group, []).append(result)
    page = render_page(
        "evaluate/report.html.jinja",
        metrics=metrics,
        groups=groups,
        losses=[result for result in results if result.is_loss],
        galleries={
            result.benchmark.name: build_cards(result, limit, files.storage) for result in results if result.answers
        },
        labels=METRIC_LABELS,
        model=model,
    )
    write_atomic(folder / "index.html", page)
    write_atomic(folder / "scores.json", encode(metrics))


def build_cards(result: BenchmarkResult, limit: int, storage: Path) -> list[AnswerCard]:
    """Build cards of some incorrect and some correct answers, spread over the benchmark."""
    incorrect = [answer for answer in result.answers if not answer.is_correct]
    correct = [answer for answer in result.answers if answer.is_correct]
    chosen = [*_choose_evenly(incorrect), *_choose_evenly(correct)]
    questions = read_tsv(Path(result.benchmark.path), limit, storage=storage)
    images = {q.index: q.images for q in questions if q.images}
    return [
        AnswerCard(answer=a, thumbnail=encode_thumbnail(images[a.index][0]) if a.index in images else "")
        for a in chosen
    ]


def _choose_evenly(answers: list[Answer]) -> list[Answer]:
    """Choose at most MAX_CARDS answers at equal distances."""
    count = min(MAX_CARDS, len(answers))
    return [answers[i * len(answers) // count] for i in range(count)]
