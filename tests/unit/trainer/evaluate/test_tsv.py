"""Benchmark files: what VLMEvalKit writes is read, and what is wrong is named with its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sailvl_trainer.contract import Metric
from sailvl_trainer.errors import DataError
from sailvl_trainer.evaluate.benchmark import check
from sailvl_trainer.evaluate.generate import build_prompt
from sailvl_trainer.evaluate.tsv import read_tsv
from tests.support.builders.evaluation import build_benchmark, draw, encode, write_tsv

RED, BLUE = encode(draw("red")), encode(draw("blue"))
GOOD: dict[str, Any] = {"index": "0", "image": RED, "question": "What colour?", "answer": "red"}


def read(path: Path, *rows: dict[str, Any], **options: Any) -> Any:
    return read_tsv(write_tsv(path / "b.tsv", list(rows), **options))


def test_a_row(tmp_path: Path) -> None:
    (question,) = read(tmp_path, GOOD | {"A": "red", "C": "blue", "hint": "Look."})
    assert question.images == (draw("red"),)
    assert question.choices == {"A": "red", "C": "blue"}, "gaps stay"
    lines = ["Hint: Look.", "What colour?", "A. red", "C. blue"]
    lines.append("Answer with the option's letter from the given choices directly.")
    assert build_prompt(question).splitlines() == lines


def test_a_picture_may_be_in_another_row(tmp_path: Path) -> None:
    _, second = read(tmp_path, GOOD, GOOD | {"index": "1", "image": "0"})
    assert second.images == (draw("red"),)


def test_several_pictures(tmp_path: Path) -> None:
    (question,) = read(tmp_path, GOOD | {"image": str([RED, BLUE])})
    assert question.images == (draw("red"), draw("blue"))


def test_pictures_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(draw("red"))
    (question,) = read(tmp_path, GOOD | {"image": "", "image_path": "red.png"})
    assert question.images == (draw("red"),)


def test_words_with_tabs_lines_and_quotes(tmp_path: Path) -> None:
    words = 'one\ttwo\n"three" – Zürich'
    (question,) = read(tmp_path, GOOD | {"question": words}, encoding="utf-8-sig")
    assert (question.index, question.question) == ("0", words)


def test_a_question_without_a_picture(tmp_path: Path) -> None:
    (question,) = read(tmp_path, GOOD | {"image": ""})
    assert question.images == ()


def test_a_limit_still_finds_pictures_of_later_rows(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "b.tsv", [GOOD | {"image": "1"}, GOOD | {"index": "1"}])
    (question,) = read_tsv(path, 1)
    assert question.images == (draw("red"),)


def test_pandas_words_for_nothing_are_nothing(tmp_path: Path) -> None:
    (question,) = read(tmp_path, GOOD | {"A": "red", "B": "nan", "hint": "NaN"})
    assert (question.choices, question.hint) == ({"A": "red"}, "")


def test_base64_in_lines(tmp_path: Path) -> None:
    (question,) = read(tmp_path, GOOD | {"image": f"{RED[:76]}\n{RED[76:]}", "image_path": "name.png"})
    assert question.images == (draw("red"),)


BROKEN = [
    pytest.param([{**GOOD, "Image": RED}], "a column 'Image'; write image", id="a column in other letters"),
    pytest.param([GOOD | {"answer": "nan"}], "row 2: answer empty", id="an answer that isn't there"),
    pytest.param([GOOD, GOOD], "index 0 stands twice", id="an index twice"),
    pytest.param([GOOD | {"answer": " "}], "row 2: answer empty", id="no answer"),
    pytest.param([{"index": "0", "question": "?"}], "no column answer; it has index, question", id="no column"),
    pytest.param([GOOD | {"image": "7"}], "row 2: image is '7': neither base64 nor the index", id="a row not there"),
    pytest.param([GOOD | {"image": "?" * 80}], "row 2: image is no base64", id="no base64"),
    pytest.param([GOOD | {"image": encode(b"x" * 100)}], "row 2: image can't be read", id="no picture"),
    pytest.param(
        [GOOD | {"image": "", "image_path": "gone.png"}], "row 2: image_path: .*gone.png", id="a file not there"
    ),
    pytest.param([], "no column index", id="an empty file"),
]


@pytest.mark.parametrize(("rows", "words"), BROKEN)
def test_what_is_wrong_is_named(rows: list[dict[str, Any]], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path, *rows)


def test_a_header_alone(tmp_path: Path) -> None:
    (tmp_path / "b.tsv").write_text("index\tquestion\tanswer\n")
    with pytest.raises(DataError, match="no question"):
        read_tsv(tmp_path / "b.tsv")


def test_more_cells_than_columns(tmp_path: Path) -> None:
    (tmp_path / "b.tsv").write_text("index\tquestion\tanswer\n0\ta\tb\tc\n")
    with pytest.raises(DataError, match="row 2: more cells"):
        read_tsv(tmp_path / "b.tsv")


def test_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="TSV in UTF-8"):
        read(tmp_path, GOOD | {"question": "Zürich?"}, encoding="latin-1")


UNSCORABLE: list[Any] = [
    pytest.param("multiple_choice", {"answer": "C", "A": "x", "B": "y"}, "its choices are A, B", id="no such choice"),
    pytest.param("multiple_choice", {"answer": "A"}, "its choices are none", id="no choices"),
    pytest.param("anls", {"answer": "[]"}, "an empty list", id="no accepted answer"),
    pytest.param("yes_no_f1", {"answer": "maybe"}, "needs yes or no", id="neither yes nor no"),
]


@pytest.mark.parametrize(("metric", "fields", "words"), UNSCORABLE)
def test_what_a_metric_cannot_score(metric: Metric, fields: dict[str, str], words: str, tmp_path: Path) -> None:
    benchmark = build_benchmark(write_tsv(tmp_path / "b.tsv", [GOOD | fields]), metric)
    with pytest.raises(DataError, match=words):
        check(benchmark, 0)
