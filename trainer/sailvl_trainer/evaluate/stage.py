"""The evaluate stage: a training stage's model scored on benchmarks, greedily; what was answered survives a stop."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from pathlib import Path

from sailvl_trainer.contract import EXPORT_DIR, EvaluateConfig, Result
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.evaluate import benchmark as benchmarks
from sailvl_trainer.evaluate.answer_cache import KeptAnswers
from sailvl_trainer.evaluate.benchmark import Scored
from sailvl_trainer.evaluate.generate import Generator
from sailvl_trainer.evaluate.report import write_report
from sailvl_trainer.model.build import build_model
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.context import Context


def run(context: Context) -> Result:
    """Carry the stage out; the same scores on any number of ranks."""
    started, config = time.time(), context.stage.evaluate
    assert config is not None, "read_stage has checked the kind"
    _require_names([entry.name for entry in config.benchmarks], {entry.group for entry in config.benchmarks})
    total = sum(benchmarks.check(entry, config.limit) for entry in config.benchmarks)
    generator, kept = _load(context, config), KeptAnswers(context)
    context.telemetry.update(phase="running", unit="questions", step=0, steps=total)
    scored: list[Scored] = []
    for entry in config.benchmarks:
        found = benchmarks.evaluate(context, generator, entry, kept, limit=config.limit, batch_size=config.batch_size)
        scored.append(found)
        context.telemetry.update(metrics={entry.name: found.score})
    metrics = summarise(scored)
    if context.is_first:
        write_report(context.files.report, scored, metrics, model=context.stage.init_from or "")
    return Result(
        stage=context.stage.stage,
        kind="evaluate",
        digest=context.stage.digest,
        attempt=context.stage.attempt,
        output=context.files.relative_path(context.files.output),
        steps=total,
        samples=total,
        seconds=time.time() - started,
        metrics=metrics,
    )


def summarise(scored: list[Scored]) -> dict[str, float]:
    """Plain means, as the paper's: over all benchmarks, and over those of each group; losses stand beside them."""
    groups: dict[str, list[float]] = defaultdict(list)
    for entry in scored:
        if not entry.is_loss:
            groups[entry.benchmark.group].append(entry.score)
    scores = [score for group in groups.values() for score in group]
    metrics = {"score": _mean(scores)} if scores else {}
    metrics |= {f"score{group}": _mean(of_group) for group, of_group in groups.items()}
    return metrics | {entry.benchmark.name: entry.score for entry in scored}


def _require_names(names: list[str], groups: set[str]) -> None:
    """Each has a place of its own among the metrics."""
    taken = {"score", *(f"score{group}" for group in groups)}
    for name, number in Counter(names).items():
        if number > 1 or name in taken:
            problem = "stands twice" if number > 1 else "is the name of a mean"
            raise ConfigError(f"benchmark {name} {problem}; give it a name of its own")


def _load(context: Context, config: EvaluateConfig) -> Generator:
    stage = context.stage
    if stage.init_from is None:
        raise ConfigError("an evaluate stage needs a training stage before it, or initFrom")
    export = Path(stage.init_from) / EXPORT_DIR
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
