"""Evaluate one benchmark: check its questions, generate answers on all ranks, and score them.

A benchmark with metric caption_loss has no questions; its result is the loss on held-out samples. Called by stage.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.contract import HELD_OUT_DIR, MANIFEST_FILE, BenchmarkConfig
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.errors import DataError, Preempted
from sailvl_trainer.evaluate.answers import AnswerCache, Generator
from sailvl_trainer.evaluate.scoring import is_yes, parse_accepted_answers, score_answers
from sailvl_trainer.evaluate.tsv import Question, read_tsv
from sailvl_trainer.rank.collectives import all_gather_values
from sailvl_trainer.rank.context import Context
from sailvl_trainer.train.dataset_cache import open_dataset
from sailvl_trainer.train.forward import PackedModel
from sailvl_trainer.train.validation import measure_validation_loss

TEXT_TOKENS = 2048
"""Text tokens that a pack of the caption loss has room for beside an image with the maximum number of tiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One question with the model's answer and its score."""

    index: str
    question: str
    answer: str
    """Reference answer."""
    prediction: str
    """Answer of the model."""
    score: float
    """Between 0 and 1."""

    @property
    def is_correct(self) -> bool:
        """Whether the score is at least one half."""
        return self.score >= 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkResult:
    """Score of one benchmark."""

    benchmark: BenchmarkConfig
    score: float
    """Between 0 and 100, higher is better. For caption_loss in nats per loss token, lower is better."""
    answers: list[Answer]
    """Answers in the order of questions; empty for caption_loss."""

    @property
    def is_loss(self) -> bool:
        """Whether the score is a loss, which is excluded from means of scores."""
        return self.benchmark.metric == "caption_loss"


def check_benchmark(benchmark: BenchmarkConfig, limit: int, storage: Path) -> int:
    """Return the number of questions. Raises DataError if the metric can't score one of them.

    `limit`: number of questions to use; 0: all. `storage`: root of the storage, which images may be on.
    """
    if benchmark.metric == "caption_loss":
        _find_shards(benchmark)
        return 0
    questions = read_tsv(Path(benchmark.path), limit, storage=storage)
    for question in questions:
        if problem := _find_problem(benchmark, question):
            raise DataError(f"benchmark {benchmark.path}, index {question.index}: {problem}")
    return len(questions)


def evaluate_benchmark(
    context: Context,
    generator: Generator,
    benchmark: BenchmarkConfig,
    cache: AnswerCache,
    *,
    limit: int,
    batch_size: int,
) -> BenchmarkResult:
    """Generate and score all answers. COLLECTIVE; the result is the same for any number of ranks.

    Raises Preempted if a stop is requested; the answers so far stay in the cache.
    """
    if benchmark.metric == "caption_loss":
        loss = _measure_caption_loss(context, generator, benchmark, limit)
        return BenchmarkResult(benchmark=benchmark, score=loss, answers=[])
    questions = read_tsv(Path(benchmark.path), limit, storage=context.files.storage)
    batches = [questions[i : i + batch_size] for i in range(0, len(questions), batch_size)]
    predictions = _generate_answers(context, generator, benchmark, cache, batches)
    score, answer_scores = score_answers(benchmark.metric, predictions, questions)
    answers = [
        Answer(index=q.index, question=q.question, answer=q.answer, prediction=p, score=s)
        for q, p, s in zip(questions, predictions, answer_scores, strict=True)
    ]
    return BenchmarkResult(benchmark=benchmark, score=score * benchmark.scale, answers=answers)


def _find_problem(benchmark: BenchmarkConfig, question: Question) -> str:
    """Return why the metric can't score the question; empty if it can."""
    answer, letters = question.answer.strip(), ", ".join(question.choices)
    if not parse_accepted_answers(question):
        return "answer is an empty list; give at least one accepted answer"
    if benchmark.metric == "multiple_choice" and answer.upper() not in question.choices:
        return f"answer is {answer!r}, but its choices are {letters or 'none'}; use one of their letters"
    if benchmark.metric == "yes_no_f1" and not is_yes(answer) and not answer.lower().startswith("no"):
        return f"answer is {answer!r}; metric yes_no_f1 needs yes or no"
    return ""


def _generate_answers(
    context: Context,
    generator: Generator,
    benchmark: BenchmarkConfig,
    cache: AnswerCache,
    batches: Sequence[Sequence[Question]],
) -> list[str]:
    """Return the answers of all batches. COLLECTIVE.

    In each round every rank answers one batch; after each round all ranks agree on whether to stop.
    """
    found = [cache.find(benchmark.name, batch) for batch in batches]
    cached = {number: answers for number, answers in enumerate(found) if answers is not None}
    generated: dict[int, list[str]] = {}
    open_batches = [number for number in range(len(batches)) if number not in cached]
    step = context.telemetry.progress.step + sum(len(batches[number]) for number in cached)
    for first in range(0, len(open_batches), context.world_size):
        round_batches = open_batches[first : first + context.world_size]
        for number in round_batches[context.rank : context.rank + 1]:
            with context.telemetry.activity("evaluating"):
                generated[number] = generator.generate_answers(batches[number], benchmark.max_tiles)
            cache.add(benchmark.name, batches[number], generated[number])
        step += sum(len(batches[number]) for number in round_batches)
        context.telemetry.update(step=step)
        if context.preemption.should_stop():
            raise Preempted(f"stopped on request during benchmark {benchmark.name}; its answers so far are kept")
    answered = dict(cached)
    for answers_by_batch in all_gather_values(dict[int, list[str]], generated):
        answered |= answers_by_batch
    return [answer for number in range(len(batches)) for answer in answered[number]]


def _measure_caption_loss(context: Context, generator: Generator, benchmark: BenchmarkConfig, limit: int) -> float:
    """Return the mean loss of the caption tokens given the images, in nats per token. COLLECTIVE."""
    folder = _find_shards(benchmark)
    max_tiles = benchmark.max_tiles + 1  # with the thumbnail
    encoder = SampleEncoder(
        tokenizer=generator.tokenizer,
        preset=generator.preset,
        max_tiles=benchmark.max_tiles,
        pack_tokens=TEXT_TOKENS + max_tiles * generator.preset.tokens_per_tile,
    )
    dataset = open_dataset(context, [folder.parent], folder.name, encoder)
    if not len(dataset):
        raise DataError(f"benchmark {folder} contains no samples, so its loss is undefined")
    with context.telemetry.activity("evaluating"):
        loss = measure_validation_loss(
            context,
            PackedModel(generator.model),
            dataset,
            encoder,
            samples=limit or len(dataset),
            pack_tiles=4 * max_tiles,
        )
    if loss is None:
        raise DataError(f"benchmark {folder} contains no caption tokens, so its loss is undefined")
    return loss


def _find_shards(benchmark: BenchmarkConfig) -> Path:
    """Return the directory with the manifest: the benchmark's path or the held-out split below it. Raises DataError."""
    folder = Path(benchmark.path)
    for candidate in (folder, folder / HELD_OUT_DIR):
        if (candidate / MANIFEST_FILE).exists():
            return candidate
    raise DataError(
        f"benchmark {folder}: found no {MANIFEST_FILE} there or in {HELD_OUT_DIR}/; set path to a directory of shards"
    )
