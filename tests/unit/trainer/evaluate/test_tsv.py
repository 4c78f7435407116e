"""Tests of reading VLMEvalKit's benchmark files, and of errors that name the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sailvl_trainer.errors import DataError
from sailvl_trainer.evaluate.answers import build_prompt
from sailvl_trainer.evaluate.tsv import read_tsv
from tests.support.builders.evaluation import build_row, draw_colour, encode_base64, write_tsv

RED, BLUE = encode_base64(draw_colour("red")), encode_base64(draw_colour("blue"))
ROW = build_row()


def write_and_read(path: Path, *rows: dict[str, Any], **options: Any) -> Any:
    return read_tsv(write_tsv(path / "b.tsv", list(rows), **options))


def test_row_becomes_a_question_with_choices_and_hint(tmp_path: Path) -> None:
    (question,) = write_and_read(tmp_path, build_row(A="red", C="blue", hint="Look."))
    assert question.images == (draw_colour("red"),)
    assert question.choices == {"A": "red", "C": "blue"}, "missing letters are not filled"
    lines = ["Hint: Look.", "What colour?", "A. red", "C. blue"]
    lines.append("Answer with the option's letter from the given choices directly.")
    assert build_prompt(question).splitlines() == lines


def test_image_cell_may_refer_to_another_row(tmp_path: Path) -> None:
    _, second = write_and_read(tmp_path, ROW, build_row(index="1", image="0"))
    assert second.images == (draw_colour("red"),)


def test_image_cell_may_be_a_list_of_images(tmp_path: Path) -> None:
    (question,) = write_and_read(tmp_path, build_row(image=str([RED, BLUE])))
    assert question.images == (draw_colour("red"), draw_colour("blue"))


def test_image_path_is_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(draw_colour("red"))
    (question,) = write_and_read(tmp_path, build_row(image="", image_path="red.png"))
    assert question.images == (draw_colour("red"),)


def test_cell_may_contain_tabs_line_breaks_and_quotes(tmp_path: Path) -> None:
    text = 'one\ttwo\n"three" – Zürich'
    (question,) = write_and_read(tmp_path, build_row(question=text), encoding="utf-8-sig")
    assert (question.index, question.question) == ("0", text)


def test_question_may_have_no_image(tmp_path: Path) -> None:
    (question,) = write_and_read(tmp_path, build_row(image=""))
    assert question.images == ()


def test_limited_questions_may_refer_to_images_of_later_rows(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "b.tsv", [build_row(image="1"), build_row(index="1")])
    (question,) = read_tsv(path, 1)
    assert question.images == (draw_colour("red"),)


def test_nan_cells_of_pandas_are_empty(tmp_path: Path) -> None:
    (question,) = write_and_read(tmp_path, build_row(A="red", B="nan", hint="NaN"))
    assert (question.choices, question.hint) == ({"A": "red"}, "")


def test_base64_may_contain_line_breaks(tmp_path: Path) -> None:
    (question,) = write_and_read(tmp_path, ROW | {"image": f"{RED[:76]}\n{RED[76:]}", "image_path": "name.png"})
    assert question.images == (draw_colour("red"),)


BROKEN = [
    pytest.param([{**ROW, "Image": RED}], "unknown column 'Image'; rename it to image", id="column in other case"),
    pytest.param([build_row(answer="nan")], "row 2: answer is empty", id="answer is nan"),
    pytest.param([ROW, ROW], "duplicate index 0", id="duplicate index"),
    pytest.param([build_row(answer=" ")], "row 2: answer is empty", id="blank answer"),
    pytest.param(
        [{"index": "0", "question": "?"}], "missing column answer; found index, question", id="missing column"
    ),
    pytest.param(
        [build_row(image="7")], "row 2: image '7' is neither base64 nor the index", id="reference to a missing row"
    ),
    pytest.param([build_row(image="?" * 80)], "row 2: image is not valid base64", id="invalid base64"),
    pytest.param([build_row(image=encode_base64(b"x" * 100))], "row 2: unreadable image", id="base64 of no image"),
    pytest.param(
        [build_row(image="", image_path="gone.png")], "row 2: image_path: .*gone.png", id="missing image file"
    ),
    pytest.param([], "missing column index", id="empty file"),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_error_names_row_and_problem(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        write_and_read(tmp_path, *rows)


def test_file_without_rows_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b.tsv").write_text("index\tquestion\tanswer\n")
    with pytest.raises(DataError, match="contains no questions"):
        read_tsv(tmp_path / "b.tsv")


def test_row_with_more_cells_than_columns_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b.tsv").write_text("index\tquestion\tanswer\n0\ta\tb\tc\n")
    with pytest.raises(DataError, match="row 2: more cells"):
        read_tsv(tmp_path / "b.tsv")


def test_other_encoding_than_utf8_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="TSV in UTF-8"):
        write_and_read(tmp_path, build_row(question="Zürich?"), encoding="latin-1")
