"""The report of an evaluate stage: scores.json and predictions.jsonl for programs, index.html for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sailvl_trainer.evaluate.benchmark import Answer, Scored
from sailvl_trainer.evaluate.tsv import read_tsv
from sailvl_trainer.reporting.render import render
from sailvl_trainer.reporting.thumbnails import draw_thumbnail
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode

SHOWN = 6
"""Wrong answers, and right ones, of a benchmark."""
METRICS = {
    "multiple_choice": "multiple choice",
    "exact_match": "exact match",
    "vqa_accuracy": "VQA accuracy",
    "relaxed_accuracy": "relaxed accuracy",
    "anls": "ANLS",
    "yes_no_f1": "F1 of yes",
    "caption_loss": "nats a token; less is better",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """An answer with its picture, which is empty where there is none or it can't be shown."""

    answer: Answer
    data: str

    @property
    def is_right(self) -> bool:
        return self.answer.score >= 0.5


def write_report(folder: Path, scored: list[Scored], metrics: dict[str, float], *, model: str) -> None:
    """All three files; `model`: where it came from."""
    lines = (encode({"benchmark": s.benchmark.name} | asdict(answer)) for s in scored for answer in s.answers)
    write_atomic(folder / "predictions.jsonl", b"\n".join([*lines, b""]))
    groups: dict[str, list[Scored]] = {}
    for entry in scored:
        if not entry.is_loss:
            groups.setdefault(entry.benchmark.group, []).append(entry)
    page = render(
        "evaluate/report.html.jinja",
        metrics=metrics,
        groups=groups,
        losses=[entry for entry in scored if entry.is_loss],
        galleries={entry.benchmark.name: choose_tiles(entry) for entry in scored if entry.answers},
        names=METRICS,
        model=model,
    )
    write_atomic(folder / "index.html", page)
    write_atomic(folder / "scores.json", encode(metrics))


def choose_tiles(scored: Scored) -> list[Tile]:
    """Some wrong answers and some right ones, spread over the benchmark; only their pictures are read."""
    wrong = [a for a in scored.answers if a.score < 0.5]
    right = [a for a in scored.answers if a.score >= 0.5]
    chosen = [*_spread(wrong), *_spread(right)]
    images = {q.index: q.images for q in read_tsv(Path(scored.benchmark.path)) if q.images}
    return [Tile(answer=a, data=draw_thumbnail(images[a.index][0]) if a.index in images else "") for a in chosen]


def _spread(answers: list[Answer]) -> Iterable[Answer]:
    """At most SHOWN, evenly."""
    number = min(SHOWN, len(answers))
    return [answers[i * len(answers) // number] for i in range(number)]
