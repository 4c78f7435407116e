"""One benchmark: its questions checked, answered over all ranks, and scored; or the loss on its held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.contract import HELD_OUT_DIR, MANIFEST_FILE, BenchmarkConfig
from sailvl_trainer.data.dataset import build_dataset
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.errors import DataError, Preempted
from sailvl_trainer.evaluate.answer_cache import KeptAnswers
from sailvl_trainer.evaluate.generate import Generator
from sailvl_trainer.evaluate.scoring import answers_of, is_yes, score_answers
from sailvl_trainer.evaluate.tsv import Question, read_tsv
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed import all_gather_object
from sailvl_trainer.train.forward import PackedModel
from sailvl_trainer.train.validation import measure_validation_loss

WORDS = 2048
"""Positions of a pack of the caption loss beside those of a picture with all its tiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One question, answered and scored."""

    index: str
    question: str
    answer: str
    prediction: str
    score: float
    """0..1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One benchmark's outcome."""

    benchmark: BenchmarkConfig
    score: float
    """0..100; of caption_loss nats a token, where less is better."""
    answers: list[Answer]
    """Of the questions in order; none of caption_loss."""

    @property
    def is_loss(self) -> bool:
        """Whether the score is a loss, which no mean of scores takes part in."""
        return self.benchmark.metric == "caption_loss"


def check(benchmark: BenchmarkConfig, limit: int) -> int:
    """Number of its questions. Raises DataError for a question that its metric can't score."""
    if benchmark.metric == "caption_loss":
        _find_shards(benchmark)
        return 0
    questions = read_tsv(Path(benchmark.path), limit)
    for question in questions:
        if problem := _find_problem(benchmark, question):
            raise DataError(f"benchmark {benchmark.path}, index {question.index}: {problem}")
    return len(questions)


def evaluate(
    context: Context,
    generator: Generator,
    benchmark: BenchmarkConfig,
    kept: KeptAnswers,
    *,
    limit: int,
    batch_size: int,
) -> Scored:
    """The same on any number of ranks. Raises Preempted when a stop is asked for; what was answered is kept."""
    if benchmark.metric == "caption_loss":
        return Scored(benchmark=benchmark, score=_measure_loss(context, generator, benchmark, limit), answers=[])
    questions = read_tsv(Path(benchmark.path), limit)
    batches = [questions[i : i + batch_size] for i in range(0, len(questions), batch_size)]
    predictions = _answer(context, generator, benchmark, kept, batches)
    score, own = score_answers(benchmark.metric, predictions, questions)
    answers = [
        Answer(index=q.index, question=q.question, answer=q.answer, prediction=p, score=s)
        for q, p, s in zip(questions, predictions, own, strict=True)
    ]
    return Scored(benchmark=benchmark, score=score * benchmark.scale, answers=answers)


def _find_problem(benchmark: BenchmarkConfig, question: Question) -> str:
    answer, letters = question.answer.strip(), ", ".join(question.choices)
    if not answers_of(question):
        return "answer is an empty list; write at least one accepted answer"
    if benchmark.metric == "multiple_choice" and answer.upper() not in question.choices:
        return f"answer is {answer!r}, its choices are {letters or 'none'}; write one of their letters"
    if benchmark.metric == "yes_no_f1" and not is_yes(answer) and not answer.lower().startswith("no"):
        return f"answer is {answer!r}; yes_no_f1 needs yes or no"
    return ""


def _answer(
    context: Context,
    generator: Generator,
    benchmark: BenchmarkConfig,
    kept: KeptAnswers,
    batches: Sequence[Sequence[Question]],
) -> list[str]:
    """Rounds of a batch a rank, so that all ranks hear of a stop in the same one."""
    found = [kept.find(benchmark.name, batch) for batch in batches]
    before = {number: answers for number, answers in enumerate(found) if answers is not None}
    mine: dict[int, list[str]] = {}
    todo = [number for number in range(len(batches)) if number not in before]
    step = context.telemetry.progress.step + sum(len(batches[number]) for number in before)
    for at in range(0, len(todo), context.world_size):
        now = todo[at : at + context.world_size]
        for number in now[context.rank : context.rank + 1]:
            with context.telemetry.activity("evaluating"):
                mine[number] = generator.answer(batches[number], benchmark.max_tiles)
            kept.add(benchmark.name, batches[number], mine[number])
        step += sum(len(batches[number]) for number in now)
        context.telemetry.update(step=step)
        if context.preemption.should_stop():
            raise Preempted(f"stopped on request in {benchmark.name}; the answers so far are kept")
    answered = before | {number: answers for rank in all_gather_object(mine) for number, answers in rank.items()}
    return [answer for number in range(len(batches)) for answer in answered[number]]


def _measure_loss(context: Context, generator: Generator, benchmark: BenchmarkConfig, limit: int) -> float:
    """Nats a labelled token of the samples' captions, given their pictures."""
    folder = _find_shards(benchmark)
    most = benchmark.max_tiles + 1
    encoder = SampleEncoder(
        tokenizer=generator.tokenizer,
        preset=generator.preset,
        max_tiles=benchmark.max_tiles,
        pack_tokens=WORDS + most * generator.preset.tokens_per_tile,
    )
    dataset = build_dataset([folder.parent], folder.name, encoder)
    if not len(dataset):
        raise DataError(f"benchmark {folder}: it holds no sample, so it has no loss")
    with context.telemetry.activity("evaluating"):
        return measure_validation_loss(
            context,
            PackedModel(generator.model),
            dataset,
            encoder,
            samples=limit or len(dataset),
            pack_tiles=4 * most,
        )


def _find_shards(benchmark: BenchmarkConfig) -> Path:
    """The directory itself, or the held-out part of the prepared set that it is."""
    folder = Path(benchmark.path)
    for place in (folder, folder / HELD_OUT_DIR):
        if (place / MANIFEST_FILE).exists():
            return place
    raise DataError(f"benchmark {folder}: neither it nor its {HELD_OUT_DIR}/ has {MANIFEST_FILE}; give a prepared set")
