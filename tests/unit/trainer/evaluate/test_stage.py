"""Tests of the whole evaluate stage with an untrained model: outputs, stopping, and answers that never change."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from sailvl_trainer.contract import BenchmarkConfig, Result, Stage
from sailvl_trainer.demo.build_data import make_questions
from sailvl_trainer.errors import ConfigError, DataError, Preempted
from sailvl_trainer.evaluate.answers import Generator
from sailvl_trainer.evaluate.benchmark import BenchmarkResult
from sailvl_trainer.evaluate.stage import build_metrics, run
from sailvl_trainer.evaluate.tsv import read_tsv
from sailvl_trainer.model.build import build_model
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.context import build_single_process_context
from tests.support.builders.evaluation import build_benchmark, build_stage, export_untrained, write_questions
from tests.support.builders.training import start_ranks

RANK = Path(__file__).parents[3] / "support/ranks/evaluate.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = export_untrained(tmp_path_factory.mktemp("storage"))
    write_questions(root / "benchmarks/colours.tsv")
    write_questions(root / "benchmarks/more.tsv", 3)
    return root


@pytest.fixture(scope="module")
def benchmarks(root: Path) -> tuple[BenchmarkConfig, ...]:
    return tuple(build_benchmark(root / f"benchmarks/{name}.tsv") for name in ("colours", "more"))


def run_stage(stage: Stage) -> Result:
    return run(build_single_process_context(stage, scratch=Path(stage.output) / f"scratch-{stage.attempt}"))


def read_predictions(stage: Stage) -> list[dict[str, Any]]:
    lines = (Path(stage.output) / "report/predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def finished(root: Path, benchmarks: tuple[BenchmarkConfig, ...]) -> tuple[Stage, Result]:
    stage = build_stage(root, *benchmarks, run="finished")
    return stage, run_stage(stage)


def test_result_and_files_hold_all_scores_and_predictions(finished: tuple[Stage, Result]) -> None:
    stage, result = finished
    assert result.metrics.keys() == {"score", "scoreCustom", "colours", "more"}
    assert (result.steps, result.samples) == (10, 10)
    assert [p["index"] for p in read_predictions(stage)] == [*map(str, range(7)), *map(str, range(3))]
    assert json.loads((Path(stage.output) / "report/scores.json").read_bytes()) == result.metrics


def test_report_is_self_contained(finished: tuple[Stage, Result]) -> None:
    stage, _ = finished
    page = (Path(stage.output) / "report/index.html").read_text()
    assert "http" not in page
    assert page.count("data:image/jpeg;base64,") == 8, "two of ten questions have no image"
    assert "Incorrect answers" in page
    assert "expected: yellow" in page


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch_size(root: Path, finished: tuple[Stage, Result]) -> None:
    config = finished[0].evaluate
    assert config is not None
    stage = build_stage(root, *config.benchmarks, run="alone", batch_size=1)
    run_stage(stage)
    assert read_predictions(stage) == read_predictions(finished[0])


@pytest.mark.slow
def test_two_ranks_give_the_same_answers_as_one(root: Path, finished: tuple[Stage, Result]) -> None:
    stage = replace(finished[0], run="pair", output=str(root / "pair/evaluate"))
    ranks = start_ranks(RANK, stage, 2, root / "scratch-pair")
    assert [rank.wait(120) for rank in ranks] == [0, 0], (root / "scratch-pair/log-0").read_text()[-2000:]
    assert read_predictions(stage) == read_predictions(finished[0])
    assert json.loads((root / "scratch-pair/result.json").read_bytes())["metrics"] == finished[1].metrics


@pytest.mark.slow
def test_answers_before_a_stop_are_reused(
    root: Path, finished: tuple[Stage, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(finished[0], run="stopped", output=str(root / "stopped/evaluate"))
    answer, answered = Generator.generate_answers, list[str]()

    def answer_and_stop(self: Generator, questions: Any, max_tiles: int) -> list[str]:
        answered.extend(question.index for question in questions)
        (Path(stage.output) / "scratch-1/stop").touch()
        return answer(self, questions, max_tiles)

    monkeypatch.setattr(Generator, "generate_answers", answer_and_stop)
    with pytest.raises(Preempted, match="during benchmark colours"):
        run_stage(stage)
    (cache,) = (Path(stage.output) / "artifacts").iterdir()
    cache.write_bytes(cache.read_bytes() + b'{"benchmark": "colours", "bat')
    assert answered == ["0", "1"]
    assert run_stage(replace(stage, attempt=2)).metrics == finished[1].metrics
    assert answered == [*map(str, range(7)), *map(str, range(3))], "each question is answered once"
    assert read_predictions(stage) == read_predictions(finished[0])


def test_caption_loss_is_reported_beside_the_scores(root: Path) -> None:
    make_questions(root / "set", level=1, number=30)
    stage = build_stage(root, build_benchmark(root / "set", "caption_loss", scale=1.0, name="captions"), run="loss")
    result = run_stage(stage)
    assert result.metrics.keys() == {"captions"}, "a loss is in no mean of scores"
    vocabulary = len(load_tokenizer(stage.model))
    assert abs(result.metrics["captions"] - math.log(vocabulary)) < 1, "an untrained model predicts all tokens alike"
    assert "captions, loss" in (Path(stage.output) / "report/index.html").read_text()


def test_batched_answer_equals_step_by_step_greedy_decoding(root: Path) -> None:
    stage = build_stage(root)
    tokenizer = load_tokenizer(stage.model, root / "model/export")
    model = build_model(stage.model, tokenizer, init_from=root / "model/export").eval()
    generator = Generator(
        model=model, tokenizer=tokenizer, preset=get_preset("tiny"), device=torch.device("cpu"), max_new_tokens=3
    )
    question = read_tsv(root / "benchmarks/colours.tsv")[0]
    ids, pixels = generator._encode(question, 1)
    sequence = list(ids)
    with torch.inference_mode():
        for _ in range(3):
            logits_V = model(
                input_ids=torch.tensor([sequence]), pixel_values=torch.from_numpy(pixels), vision_feature_layer=-1
            ).logits[0, -1]
            sequence.append(int(functional.softmax(logits_V, dim=-1).argmax()))
    assert generator.generate_answers([question], 1) == [
        tokenizer.decode(sequence[len(ids) :], skip_special_tokens=True).strip()
    ]


def test_broken_benchmark_fails_before_the_first_answer(
    root: Path, benchmarks: tuple[BenchmarkConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[Any] = []
    monkeypatch.setattr(Generator, "generate_answers", lambda *_: answered.append(1))
    broken = build_benchmark(root / "benchmarks/gone.tsv")
    with pytest.raises(DataError, match=r"gone\.tsv"):
        run_stage(build_stage(root, *benchmarks, broken, run="mistake"))
    assert not answered


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(["a", "a"], "duplicate benchmark name a", id="duplicate"),
        pytest.param(["a", "scoreCustom"], "scoreCustom is reserved for a mean score", id="name of a mean"),
    ],
)
def test_benchmark_names_must_be_unique_and_not_reserved(names: list[str], message: str, root: Path) -> None:
    same = [build_benchmark(root / "benchmarks/more.tsv", name=name) for name in names]
    with pytest.raises(ConfigError, match=message):
        run_stage(build_stage(root, *same, run="names"))


def test_stage_without_a_model_is_a_config_error(root: Path, benchmarks: tuple[BenchmarkConfig, ...]) -> None:
    with pytest.raises(ConfigError, match="initFrom"):
        run_stage(replace(build_stage(root, *benchmarks, run="none"), init_from=None))


def test_metrics_are_unweighted_means_over_all_and_by_group() -> None:
    def build_result(name: str, group: str, score: float, metric: Any = "anls") -> BenchmarkResult:
        benchmark = BenchmarkConfig(name=name, path="", metric=metric, group=group)
        return BenchmarkResult(benchmark=benchmark, score=score, answers=[])

    results = [build_result("a", "OCR", 10), build_result("b", "OCR", 20), build_result("c", "General", 60)]
    metrics = build_metrics([*results, build_result("d", "General", 2.5, "caption_loss")])
    assert metrics == {"score": 30, "scoreOCR": 15, "scoreGeneral": 60, "a": 10, "b": 20, "c": 60, "d": 2.5}
