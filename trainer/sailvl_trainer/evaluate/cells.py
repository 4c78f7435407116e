"""Cells of a benchmark's TSV: one value, or a list as Python prints it.

The parser accepts flat lists of strings and numbers and runs in linear time; nothing is evaluated. Called by tsv.py for
images and by scoring.py for accepted answers.
"""

from __future__ import annotations

import re
import unicodedata

MAX_LIST_LENGTH = 4096
"""Largest number of values of a list; a longer one is read as text."""
_STRING = r"""[uU]?(?:'(?P<single>[^'\\\n]*+(?:\\.[^'\\\n]*+)*+)'|"(?P<double>[^"\\\n]*+(?:\\.[^"\\\n]*+)*+)")"""
_NUMBER = r"[+-]?(?:\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(?:[eE][+-]?\d{1,3})?"
_VALUE = re.compile(rf"\s*+(?:{_STRING}|(?P<number>{_NUMBER}))\s*+(?P<end>,\s*+\]|[,\]])", re.ASCII | re.DOTALL)
"""A value of a list with the comma or the bracket after it. Its quantifiers are possessive: they never backtrack."""
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|N\{([^}]{1,100})\}|(.))", re.DOTALL
)
_LETTER_ESCAPES = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
    "\\": "\\", "'": "'", '"': '"', "\n": "",
}  # fmt: skip
_EMPTY_LIST = re.compile(r"\[\s*+\]")


def parse_list(text: str) -> list[str | float] | None:
    """Parse a flat list of strings and numbers; return None for any other text, such as a nested list."""
    if not text.startswith("["):
        return None
    if _EMPTY_LIST.fullmatch(text):
        return []
    values: list[str | float] = []
    position = 1
    while len(values) < MAX_LIST_LENGTH and (found := _VALUE.match(text, position)):
        value = _parse_value(found)
        if value is None:
            return None
        values.append(value)
        position = found.end()
        if found["end"] != ",":
            return values if position == len(text) else None
    return None


def _parse_value(found: re.Match[str]) -> str | float | None:
    """Return a matched value; None if Python would refuse its number or one of its escapes."""
    try:
        if (number := found["number"]) is not None:
            return float(number) if re.search(r"[.eE]", number) else _parse_integer(number)
        quoted = found["single"] if found["single"] is not None else found["double"]
        return _ESCAPE.sub(_unescape, quoted) if "\\" in quoted else quoted
    except ValueError:
        return None


def _parse_integer(text: str) -> int:
    """Parse an integer. Raises ValueError for leading zeros, as Python does."""
    digits = text.lstrip("+-")
    if digits.startswith("0") and digits.strip("0"):
        raise ValueError(f"leading zeros in {text}")
    return int(text)


def _unescape(found: re.Match[str]) -> str:
    """Return the character of an escape; an unknown one stays as it is. Raises ValueError if there is no such one."""
    hexadecimal, octal, name, letter = found[1] or found[2] or found[3], found[4], found[5], found[6]
    if hexadecimal or octal:
        return _build_character(int(hexadecimal, 16) if hexadecimal else int(octal, 8))
    if name:
        try:
            return unicodedata.lookup(name)
        except KeyError as error:
            raise ValueError(f"there is no character {name}") from error
    if letter in "xuUN":
        raise ValueError(f"incomplete escape \\{letter}")
    return _LETTER_ESCAPES.get(letter, f"\\{letter}")


def _build_character(code_point: int) -> str:
    """Return the character of a code point. Raises ValueError for a surrogate, which UTF-8 can't represent."""
    if code_point > 0x10FFFF or 0xD800 <= code_point <= 0xDFFF:
        raise ValueError(f"U+{code_point:X} is no character")
    return chr(code_point)
