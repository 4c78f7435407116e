"""A whole evaluate stage with an untrained model: its files, its stops, and what must not change its answers."""

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
from sailvl_trainer.evaluate import generate
from sailvl_trainer.evaluate.benchmark import Scored
from sailvl_trainer.evaluate.stage import run, summarise
from sailvl_trainer.evaluate.tsv import read_tsv
from sailvl_trainer.model.build import build_model
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.context import build_single_process_context
from tests.support.builders.evaluation import build_benchmark, build_questions, build_stage, export_untrained
from tests.support.builders.training import start_ranks

RANK = Path(__file__).parents[3] / "support/ranks/evaluate.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = export_untrained(tmp_path_factory.mktemp("storage"))
    build_questions(root / "benchmarks/colours.tsv")
    build_questions(root / "benchmarks/more.tsv", 3)
    return root


@pytest.fixture(scope="module")
def benchmarks(root: Path) -> tuple[BenchmarkConfig, ...]:
    return tuple(build_benchmark(root / f"benchmarks/{name}.tsv") for name in ("colours", "more"))


def carry_out(stage: Stage) -> Result:
    return run(build_single_process_context(stage, scratch=Path(stage.output) / f"scratch-{stage.attempt}"))


def predictions(stage: Stage) -> list[dict[str, Any]]:
    lines = (Path(stage.output) / "report/predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def whole(root: Path, benchmarks: tuple[BenchmarkConfig, ...]) -> tuple[Stage, Result]:
    stage = build_stage(root, *benchmarks, run="whole")
    return stage, carry_out(stage)


def test_the_result_and_its_files(whole: tuple[Stage, Result]) -> None:
    stage, result = whole
    assert result.metrics.keys() == {"score", "scoreCustom", "colours", "more"}
    assert (result.steps, result.samples) == (10, 10)
    assert [p["index"] for p in predictions(stage)] == [*map(str, range(7)), *map(str, range(3))]
    assert json.loads((Path(stage.output) / "report/scores.json").read_bytes()) == result.metrics


def test_the_report_stands_alone(whole: tuple[Stage, Result]) -> None:
    stage, _ = whole
    page = (Path(stage.output) / "report/index.html").read_text()
    assert "http" not in page
    assert page.count("data:image/jpeg;base64,") == 8, "of ten questions two have no picture"
    assert "Wrong answers" in page
    assert "expected: yellow" in page


def test_the_size_of_a_batch_changes_no_answer(root: Path, whole: tuple[Stage, Result]) -> None:
    config = whole[0].evaluate
    assert config is not None
    stage = build_stage(root, *config.benchmarks, run="alone", batch_size=1)
    carry_out(stage)
    assert predictions(stage) == predictions(whole[0])


@pytest.mark.slow
def test_two_ranks_give_the_same_answers(root: Path, whole: tuple[Stage, Result]) -> None:
    stage = replace(whole[0], run="pair", output=str(root / "pair/evaluate"))
    ranks = start_ranks(RANK, stage, 2, root / "scratch-pair")
    assert [rank.wait(120) for rank in ranks] == [0, 0], (root / "scratch-pair/log-0").read_text()[-2000:]
    assert predictions(stage) == predictions(whole[0])
    assert json.loads((root / "scratch-pair/result.json").read_bytes())["metrics"] == whole[1].metrics


def test_a_stop_keeps_what_was_answered(
    root: Path, whole: tuple[Stage, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(whole[0], run="stopped", output=str(root / "stopped/evaluate"))
    answer, asked = generate.Generator.answer, list[str]()

    def answer_and_stop(self: generate.Generator, questions: Any, max_tiles: int) -> list[str]:
        asked.extend(question.index for question in questions)
        (Path(stage.output) / "scratch-1/stop").touch()
        return answer(self, questions, max_tiles)

    monkeypatch.setattr(generate.Generator, "answer", answer_and_stop)
    with pytest.raises(Preempted, match="in colours"):
        carry_out(stage)
    (parts,) = (Path(stage.output) / "parts").iterdir()
    parts.write_bytes(parts.read_bytes() + b'{"benchmark": "colours", "bat')
    assert asked == ["0", "1"]
    assert carry_out(replace(stage, attempt=2)).metrics == whole[1].metrics
    assert asked == [*map(str, range(7)), *map(str, range(3))], "each question once"
    assert predictions(stage) == predictions(whole[0])


def test_the_caption_loss_is_the_models_own(root: Path) -> None:
    make_questions(root / "set", level=1, number=30)
    stage = build_stage(root, build_benchmark(root / "set", "caption_loss", scale=1.0, name="captions"), run="loss")
    result = carry_out(stage)
    assert result.metrics.keys() == {"captions"}, "no mean of scores has it"
    vocabulary = len(load_tokenizer(stage.model))
    assert abs(result.metrics["captions"] - math.log(vocabulary)) < 1, "an untrained model guesses"
    assert "a loss" in (Path(stage.output) / "report/index.html").read_text()


def test_an_answer_is_the_greedy_one(root: Path) -> None:
    stage = build_stage(root)
    tokenizer = load_tokenizer(stage.model, root / "model/export")
    model = build_model(stage.model, tokenizer, init_from=root / "model/export").eval()
    generator = generate.Generator(
        model=model, tokenizer=tokenizer, preset=get_preset("tiny"), device=torch.device("cpu"), max_new_tokens=3
    )
    question = read_tsv(root / "benchmarks/colours.tsv")[0]
    ids, pixels = generator._encode(question, 1)
    said = list(ids)
    with torch.inference_mode():
        for _ in range(3):
            logits_V = model(
                input_ids=torch.tensor([said]), pixel_values=torch.from_numpy(pixels), vision_feature_layer=-1
            ).logits[0, -1]
            said.append(int(functional.softmax(logits_V, dim=-1).argmax()))
    assert generator.answer([question], 1) == [tokenizer.decode(said[len(ids) :], skip_special_tokens=True).strip()]


MISTAKES = [
    pytest.param("gone.tsv", "exact_match", DataError, "gone.tsv", id="no file"),
    pytest.param("", "caption_loss", DataError, "give a prepared set", id="no shards"),
]


@pytest.mark.parametrize(("name", "metric", "error", "words"), MISTAKES)
def test_mistakes_come_before_the_first_answer(name: str, metric: Any, error: Any, words: str, root: Path) -> None:
    stage = build_stage(root, build_benchmark(root / "benchmarks" / name, metric, name="b"), run="mistake")
    with pytest.raises(error, match=words):
        carry_out(stage)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        pytest.param(["a", "a"], "a stands twice", id="twice"),
        pytest.param(["a", "scoreCustom"], "scoreCustom is the name of a mean", id="a mean"),
    ],
)
def test_every_benchmark_has_a_name_of_its_own(names: list[str], words: str, root: Path) -> None:
    same = [build_benchmark(root / "benchmarks/more.tsv", name=name) for name in names]
    with pytest.raises(ConfigError, match=words):
        carry_out(build_stage(root, *same, run="names"))


def test_a_stage_without_a_model(root: Path, benchmarks: tuple[BenchmarkConfig, ...]) -> None:
    with pytest.raises(ConfigError, match="initFrom"):
        carry_out(replace(build_stage(root, *benchmarks, run="none"), init_from=None))


def test_means_are_plain_and_by_group() -> None:
    def scored(name: str, group: str, score: float, metric: Any = "anls") -> Scored:
        benchmark = BenchmarkConfig(name=name, path="", metric=metric, group=group)
        return Scored(benchmark=benchmark, score=score, answers=[])

    entries = [scored("a", "OCR", 10), scored("b", "OCR", 20), scored("c", "General", 60)]
    found = summarise([*entries, scored("d", "General", 2.5, "caption_loss")])
    assert found == {"score": 30, "scoreOCR": 15, "scoreGeneral": 60, "a": 10, "b": 20, "c": 60, "d": 2.5}
