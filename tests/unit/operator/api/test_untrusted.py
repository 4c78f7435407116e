"""Text from outside is cleaned before it reaches a status, a log or a terminal."""

from __future__ import annotations

import logging

import pytest

from sailvl_operator.api.untrusted import clean_end, clean_line, decode_json, is_metric_name
from sailvl_operator.errors import error_from_status
from sailvl_operator.logs import TextFormatter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("plain text", "plain text", id="plain"),
        pytest.param("größe 数据 🙂", "größe 数据 🙂", id="letters of all languages"),
        pytest.param("a\nb\r\tc\u2028d", "a b  c d", id="line breaks become spaces"),
        pytest.param("\x1b[2J\x1b]0;title\x07", "[2J]0;title", id="terminal escapes"),
        pytest.param("a\x00b\x7fc\x9bd", "abcd", id="control characters"),
        pytest.param("user\u202etxt.exe\u2066", "usertxt.exe", id="reversed direction"),
        pytest.param("a\ud800b", "ab", id="lone surrogate"),
        pytest.param("x" * 100, "x" * 20, id="too long"),
        pytest.param("\x00" * 100 + "x", "", id="too long and not printable"),
    ],
)
def test_line_is_cleaned_and_cut(text, expected):
    assert clean_line(text, 20) == expected


def test_end_of_text_keeps_its_lines():
    assert clean_end("dropped\nkept \x1b[1m\nlast\r", 15) == "kept [1m\nlast "


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", True),
        ("scoreArt & Design", True),
        ('score"quoted"', True),
        ("score数学", True),
        ("a" * 63, True),
        ("a" * 64, False),
        ("", False),
    ]
    + [(name, False) for name in ("a\n", "\x1b", " a", "a ", "a\u202e", "a\ud800")],
)
def test_metric_names(name, expected):
    assert is_metric_name(name) is expected


def test_decoding_has_no_limit_unless_one_is_given():
    assert decode_json(b"[" + b"1," * 10**5 + b"1]", list, subject="x") == [1] * (10**5 + 1)


def test_text_log_has_no_terminal_escapes():
    record = logging.makeLogRecord({"msg": "run %s\x1b[2J\nsecond\x00 line", "args": ("a\u202eb",)})
    assert TextFormatter("%(message)s").format(record) == "run ab[2J\nsecond line"


@pytest.mark.parametrize("retry_after", ["²", "-1", "Wed, 21 Oct 2026 07:28:00 GMT", ""])
def test_error_of_the_api_server_is_one_line_of_bounded_length(retry_after):
    error = error_from_status(429, {"message": "a\nb\x1b" + "x" * 10**6}, request="get", retry_after=retry_after)
    assert str(error).startswith("get: a bx")
    assert len(str(error)) < 5000
    assert error.retry_after == 0.0
