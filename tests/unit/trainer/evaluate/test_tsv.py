"""Tests of reading VLMEvalKit's benchmark files, and of errors that name the row."""

from __future__ import annotations

import ast
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from sailvl_trainer.errors import DataError
from sailvl_trainer.evaluate import tsv
from sailvl_trainer.evaluate.answers import build_prompt
from sailvl_trainer.evaluate.cells import parse_list
from sailvl_trainer.evaluate.scoring import parse_accepted_answers
from sailvl_trainer.evaluate.tsv import read_tsv
from tests.support.builders.evaluation import build_row, draw_colour, encode_base64, write_tsv
from tests.support.fuzz import draw_generators, fuzz, mutate_bytes

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
    pytest.param([build_row(image=encode_base64(b"x" * 100))], "row 2: invalid image", id="base64 of no image"),
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


NOT_LISTS = [
    pytest.param("[" + "-" * 200_000 + "1]", id="signs"),
    pytest.param("[" + "(" * 100_000 + "]", id="parentheses"),
    pytest.param("[" + "+".join(["1"] * 100_000) + "]", id="sums"),
    pytest.param("[" + "a." * 100_000 + "a]", id="attributes"),
    pytest.param("[" * 100_000 + "]" * 100_000, id="nested lists"),
    pytest.param("[" + "1," * 1_000_000 + "]", id="too many values"),
    pytest.param("[" + "9" * 5_000 + "]", id="long number"),
    pytest.param("['" + "\\" * 1_000_001 + "']", id="escaped quote at the end"),
    pytest.param(r"['\ud800']", id="half a surrogate pair"),
    pytest.param(r"['\Uffffffff']", id="code point beyond Unicode"),
]


@pytest.mark.parametrize("text", NOT_LISTS)
def test_text_that_no_parser_of_python_survives_is_no_list(text: str) -> None:
    assert parse_list(text) is None


LISTS = [
    "[]",
    "[ ]",
    "['a']",
    "['a', \"b'c\" , 1,-2.5,]",
    r"['\n\x41\u00e9\101\q\'\N{BULLET}']",
    "[u'a\\\nb']",
    "[1e5]",
]


@pytest.mark.parametrize("text", LISTS)
def test_flat_list_is_parsed_as_python_does(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert parse_list(text) == ast.literal_eval(text)


def test_answer_that_is_no_list_is_text(tmp_path: Path) -> None:
    answer = "[" + "-" * 60_000 + "1]"
    (question,) = write_and_read(tmp_path, build_row(answer=answer))
    assert parse_accepted_answers(question) == [answer]


def test_image_path_outside_of_folder_and_storage_is_refused(tmp_path: Path) -> None:
    folder, other = tmp_path / "benchmarks", tmp_path / "other"
    other.mkdir()
    (other / "red.png").write_bytes(draw_colour("red"))
    folder.mkdir()
    (folder / "link.png").symlink_to(other / "red.png")
    for name in ("../other/red.png", str(other / "red.png"), "link.png"):
        path = write_tsv(folder / "b.tsv", [build_row(image="", image_path=name)])
        with pytest.raises(DataError, match="row 2: image_path: leads to a file outside"):
            read_tsv(path)
        (question,) = read_tsv(path, storage=tmp_path)
        assert question.images == (draw_colour("red"),)


def test_image_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="row 2: image_path: not a regular file"):
        write_and_read(tmp_path, build_row(image="", image_path="pipe.png"))


def test_benchmark_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.tsv")
    with pytest.raises(DataError, match="not a regular file"):
        read_tsv(tmp_path / "b.tsv")


def test_questions_share_the_image_that_they_refer_to(tmp_path: Path) -> None:
    """Otherwise a small file with one large image and many references would exhaust the memory."""
    first, second, third = write_and_read(tmp_path, ROW, *(build_row(index=str(n), image="0") for n in (1, 2)))
    assert first.images == second.images
    assert second.images[0] is third.images[0]


LARGE = [
    pytest.param("question", "?" * 70_000, "row 2: question has 70000 characters", id="long text"),
    pytest.param("image", str(["7"] * 65), "row 2: more than 64 images; remove some", id="too many references"),
    pytest.param("image", str(["0"] * 5000), "row 2: image is not valid base64", id="too long a list"),
]


@pytest.mark.parametrize(("column", "cell", "message"), LARGE)
def test_cell_beyond_a_limit_is_an_error(column: str, cell: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        write_and_read(tmp_path, build_row(**{column: cell}), build_row(index="7", image=RED))


def test_too_many_columns_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "b.tsv").write_text("\t".join(["index", "question", "answer", *map(str, range(300))]) + "\n1\n" * 9)
    with pytest.raises(DataError, match="has 303 columns; remove all but 256"):
        read_tsv(tmp_path / "b.tsv")


def test_line_without_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsv, "MAX_LINE_LENGTH", 1000)
    (tmp_path / "b.tsv").write_text("index\tquestion\tanswer\n" + "a" * 5000)
    with pytest.raises(DataError, match="a line of more than 1000 characters"):
        read_tsv(tmp_path / "b.tsv")


def test_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "b.tsv").open("wb") as file:
        file.truncate(9 << 30)
    with pytest.raises(DataError, match="split it into files of at most"):
        read_tsv(tmp_path / "b.tsv")


@pytest.mark.fuzz
def test_any_change_of_a_benchmark_is_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(draw_colour("red"))
    rows = [
        build_row(A="red", B="blue", hint="Look."),
        build_row(index="1", image="0", answer=str(["red", "blue", 1.5])),
        build_row(index="2", image=str([RED, "0"]), question='one\ttwo\n"three"'),
        build_row(index="3", image="", image_path=str(["red.png"])),
    ]
    path = write_tsv(tmp_path / "b.tsv", rows)
    content = path.read_bytes()
    for generator in draw_generators(100):
        path.write_bytes(mutate_bytes(content, generator))
        try:
            for question in read_tsv(path):
                build_prompt(question)
                parse_accepted_answers(question)
        except DataError:
            continue
        except BaseException as error:
            error.add_note(f"repeat with SAILVL_FUZZ_SEED={generator.number}")  # type: ignore[attr-defined]
            raise


@pytest.mark.fuzz
def test_any_text_is_a_list_of_strings_and_numbers_or_none() -> None:
    def check(text: str) -> None:
        values = parse_list(f"[{text}]")
        assert values is None or all(isinstance(value, str | int | float) for value in values)

    alphabet = st.text("[](){},'\"\\\n\r 0123456789.eE+-xuUN:abBr#jλ\ud800", max_size=60)
    fuzz(alphabet, check, examples=200)
