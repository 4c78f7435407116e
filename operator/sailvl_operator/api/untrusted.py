"""Decode untrusted documents: what workers, tenants and other controllers wrote, or what answered in their place.

A document may hold any bytes. Every way in which it can fail to be decoded becomes a DocumentError, which the callers
handle by ignoring this document alone. Text from it is cleaned before it reaches a status, a log, an Event or a label.
"""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

import msgspec

MAX_COUNT = 10**15
"""Largest number that a worker may count or a status may hold. Sums over all stages of a run remain within int64, and
JSON readers that use floats represent it exactly."""
MAX_SECONDS = 10.0**10
"""Largest duration and Unix time, in seconds."""
MAX_NAME_LENGTH = 63
"""Letters of a metric's name."""

RECURSION_LIMIT = 12_000
"""Recursion limit with which every object decodes that the API server can store: it refuses JSON that is nested more
than 10,000 deep. With Python's own limit of 1,000 a single object with deep managed fields, which clients may write,
would make all lists and watches fail. Decoding takes at most half of a process' C stack at this limit."""

_MAX_ERROR_LENGTH = 200
"""Letters of an error's text, which may quote the document."""


class DocumentError(ValueError):
    """An untrusted document can't be used. The message says which one and why, in one line."""


def allow_deep_objects() -> None:
    """Raise the process' recursion limit to RECURSION_LIMIT."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), RECURSION_LIMIT))


def decode_json(
    content: bytes | bytearray | memoryview | str, type_: Any, *, subject: str, max_bytes: int | None = None
) -> Any:
    """Decode an untrusted JSON document of at most `max_bytes` bytes or characters. Default: of any size.

    Raises DocumentError for every failure: not UTF-8, not JSON, of another type, nested too deeply, or too large.
    `subject` names the document in the message.
    """
    if max_bytes is not None and len(content) > max_bytes:
        raise DocumentError(f"{subject} is larger than {max_bytes} bytes")
    try:
        return msgspec.json.decode(content, type=type_)
    except Exception as error:
        raise DocumentError(f"{subject} is malformed: {describe_error(error)}") from error


def describe_error(error: Exception) -> str:
    """Return the text of an error that may quote untrusted input, on one line of bounded length."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return clean_line(str(error), _MAX_ERROR_LENGTH) or type(error).__name__


def clean_line(text: str, max_length: int) -> str:
    """Return text as one line of at most `max_length` characters, without control and format characters.

    Line breaks and other white space become spaces. Terminal escapes, NUL, lone surrogates and the characters that
    reverse the direction of text are removed.
    """
    if text.isprintable():
        return text[:max_length]
    return "".join(map(_clean_character, text[: 4 * max_length]))[:max_length]


def clean_end(text: str, max_length: int) -> str:
    """Return the last `max_length` characters of text of several lines, each line cleaned as by `clean_line`."""
    return clean_lines(text[-max_length:])


def clean_lines(text: str) -> str:
    """Return text of several lines, each line cleaned as by `clean_line`."""
    lines = text.split("\n")
    return "\n".join(line if line.isprintable() else clean_line(line, len(line)) for line in lines)


def is_metric_name(name: str) -> bool:
    """Return whether a metric's name may be used as a key of the status and as a label.

    Names of benchmarks and of their groups are the user's, such as `scoreArt & Design`, so any printable text is taken.
    """
    return 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable() and name == name.strip()


def _clean_character(character: str) -> str:
    if character.isprintable():
        return character
    is_space = character in "\t\n\v\f\r" or unicodedata.category(character).startswith("Z")
    return " " if is_space else ""
