"""The evaluate stage: benchmarks answered greedily by a training stage's model, dealt to the ranks batch by batch."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sailvl_trainer.contract import EXPORT_DIR, BenchmarkConfig, EvaluateConfig, Result
from sailvl_trainer.evaluate import report
from sailvl_trainer.evaluate.generate import Generator
from sailvl_trainer.evaluate.scoring import score_answers
from sailvl_trainer.evaluate.tsv import Question, read_tsv
from sailvl_trainer.model.build import build_model
from sailvl_trainer.model.presets import preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.runtime.context import Context
from sailvl_trainer.runtime.distributed import gather
from sailvl_trainer.runtime.documents import encode, write_atomic
from sailvl_trainer.runtime.errors import ConfigError, Preempted


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One benchmark, answered and scored."""

    benchmark: BenchmarkConfig
    score: float
    """0..100."""
    answers: list[dict[str, Any]]
    """index, question, answer, prediction, score."""


def run(context: Context) -> Result:
    """Carry the stage out; the same scores on any number of ranks."""
    started, config = time.time(), context.stage.evaluate
    assert config is not None, "read_stage has checked the kind"
    generator = _load(context, config)
    questions = [read_tsv(Path(b.path), config.limit) for b in config.benchmarks if b.metric != "caption_loss"]
    total = sum(map(len, questions))
    context.telemetry.update(phase="running", unit="questions", step=0, steps=total)
    scored: list[Scored] = []
    for benchmark in config.benchmarks:
        scored.append(_evaluate(context, generator, benchmark, config))
        context.telemetry.update(step=sum(len(s.answers) for s in scored), metrics={benchmark.name: scored[-1].score})
        if context.preemption.requested():
            raise Preempted(f"stopped on request after {benchmark.name}")
    metrics = summarise(scored)
    if context.is_first:
        write_atomic(context.files.report / "scores.json", encode(metrics))
        lines = (encode({"benchmark": s.benchmark.name} | answer) for s in scored for answer in s.answers)
        write_atomic(context.files.report / "predictions.jsonl", b"\n".join(lines) + b"\n")
        report.write(context.files.report, [asdict(s) for s in scored], metrics)
    return Result(
        stage=context.stage.stage,
        kind="evaluate",
        digest=context.stage.digest,
        attempt=context.stage.attempt,
        output=context.files.relative(context.files.output),
        steps=total,
        samples=total,
        seconds=time.time() - started,
        metrics=metrics,
    )


def summarise(scored: list[Scored]) -> dict[str, float]:
    """Plain means: over all benchmarks, and over those of each group."""
    groups: dict[str, list[float]] = defaultdict(list)
    for entry in scored:
        groups[entry.benchmark.group].append(entry.score)
    metrics = {"score": _mean([entry.score for entry in scored])}
    metrics |= {f"score{group}": _mean(scores) for group, scores in groups.items()}
    return metrics | {entry.benchmark.name: entry.score for entry in scored}


def _load(context: Context, config: EvaluateConfig) -> Generator:
    stage = context.stage
    if stage.init_from is None:
        raise ConfigError("an evaluate stage needs a training stage before it, or initFrom")
    unbuilt = [b.name for b in config.benchmarks if b.metric == "caption_loss"]
    if unbuilt:
        raise ConfigError(f"metric caption_loss of {unbuilt} is not built yet; training stages report heldOutLoss")
    export = Path(stage.init_from) / EXPORT_DIR
    tokenizer = load_tokenizer(stage.model, export)
    model = build_model(stage.model, tokenizer, init_from=export).to(context.device).eval()
    return Generator(
        model=model,
        tokenizer=tokenizer,
        preset=preset(stage.model.preset),
        device=context.device,
        max_new_tokens=config.max_new_tokens,
    )


def _evaluate(context: Context, generator: Generator, benchmark: BenchmarkConfig, config: EvaluateConfig) -> Scored:
    questions = read_tsv(Path(benchmark.path), config.limit)
    batches = [questions[i : i + config.batch_size] for i in range(0, len(questions), config.batch_size)]
    mine: dict[int, list[str]] = {}
    for number in range(context.rank, len(batches), context.world_size):
        mine[number] = generator.answer(batches[number], benchmark.max_tiles)
        context.telemetry.update()
    answered = {number: answers for rank in gather(mine) for number, answers in rank.items()}
    predictions = [answer for number in range(len(batches)) for answer in answered[number]]
    score, own = score_answers(benchmark.metric, predictions, questions)
    answers = [_answer(q, p, s) for q, p, s in zip(questions, predictions, own, strict=True)]
    return Scored(benchmark=benchmark, score=score * benchmark.scale, answers=answers)


def _answer(question: Question, prediction: str, score: float) -> dict[str, Any]:
    return {
        "index": question.index,
        "question": question.question,
        "answer": question.answer,
        "prediction": prediction,
        "score": score,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
