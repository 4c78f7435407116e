"""The evaluate stage: score the model of a training stage on benchmarks by greedy decoding.

Answers are saved as they are generated, so that a later attempt continues with the open questions. Called by
rank/main.py on every rank.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from pathlib import Path

from sailvl_trainer.contract import EXPORT_DIR, EvaluateConfig, Result
from sailvl_trainer.data.image_memory import limit_image_memory
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.evaluate.answers import AnswerCache, Generator
from sailvl_trainer.evaluate.benchmark import BenchmarkResult, check_benchmark, evaluate_benchmark
from sailvl_trainer.evaluate.report import write_report
from sailvl_trainer.model.build import build_model
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.context import Context
from sailvl_trainer.train.setup import verify_export


def run(context: Context) -> Result:
    """Run the stage. COLLECTIVE; the scores are the same for any number of ranks.

    Raises ConfigError or DataError, before the model is loaded, if a benchmark can't be scored.
    """
    started, config = time.monotonic(), context.stage.evaluate
    assert config is not None, "read_stage has checked the kind"
    limit_image_memory(context.memory_bytes)
    _check_names([b.name for b in config.benchmarks], {b.group for b in config.benchmarks})
    question_count = sum(check_benchmark(b, config.limit, context.files.storage) for b in config.benchmarks)
    generator, cache = _load_generator(context, config), AnswerCache(context)
    context.telemetry.update(phase="running", unit="questions", step=0, steps=question_count)
    results: list[BenchmarkResult] = []
    for benchmark in config.benchmarks:
        result = evaluate_benchmark(
            context, generator, benchmark, cache, limit=config.limit, batch_size=config.batch_size
        )
        results.append(result)
        context.telemetry.update(metrics={benchmark.name: result.score})
    metrics = build_metrics(results)
    if context.is_first:
        write_report(context.files, results, metrics, model=context.stage.init_from or "", limit=config.limit)
    return Result(
        stage=context.stage.stage,
        kind="evaluate",
        digest=context.stage.digest,
        attempt=context.stage.attempt,
        output=context.files.relative_path(context.files.output),
        steps=question_count,
        samples=question_count,
        seconds=time.monotonic() - started,
        metrics=metrics,
    )


def build_metrics(results: list[BenchmarkResult]) -> dict[str, float]:
    """Return the score of every benchmark and, as in the SAIL-VL paper, unweighted means over all and over each group.

    Losses have no part in the means.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if not result.is_loss:
            groups[result.benchmark.group].append(result.score)
    scores = [score for group in groups.values() for score in group]
    metrics = {"score": _mean(scores)} if scores else {}
    metrics |= {f"score{group}": _mean(group_scores) for group, group_scores in groups.items()}
    return metrics | {result.benchmark.name: result.score for result in results}


def _check_names(names: list[str], groups: set[str]) -> None:
    """Raise ConfigError unless the metrics of all benchmarks and means have different names."""
    reserved = {"score", *(f"score{group}" for group in groups)}
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"duplicate benchmark name {name}; give each benchmark a unique name")
        if name in reserved:
            raise ConfigError(f"benchmark name {name} is reserved for a mean score; choose another name")


def _load_generator(context: Context, config: EvaluateConfig) -> Generator:
    stage = context.stage
    if stage.init_from is None:
        raise ConfigError("an evaluate stage needs a model; put a training stage before it or set initFrom")
    export = Path(stage.init_from) / EXPORT_DIR
    verify_export(context, export)
    tokenizer = load_tokenizer(stage.model, export)
    model = build_model(stage.model, tokenizer, init_from=export).to(context.device).eval()
    return Generator(
        model=model,
        tokenizer=tokenizer,
        preset=get_preset(stage.model.preset),
        device=context.device,
        max_new_tokens=config.max_new_tokens,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
