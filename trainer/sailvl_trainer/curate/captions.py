"""Captions: parsed from untrusted text, cleaned, and classified. Used while listing a source and by verify.py."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from functools import lru_cache
from itertools import groupby
from typing import Any

MAX_TEXT_BYTES = 1 << 20
"""Number of bytes that are read of a caption file, and maximum length of a line of JSON."""
MAX_CAPTION_LENGTH = 4000
"""Characters, about a thousand tokens; longer web text is a page rather than a caption."""
MAX_MARKS = 30
"""Combining marks in a row, as in Unicode's Stream-Safe Text Format (UAX #15, §13). Normalisation sorts the marks of
one character in quadratic time."""
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\ufeff]")
_SPACES = re.compile(r"[^\S\n]+")
_LINE_BREAKS = re.compile(r" ?\n[ \n]*")


def clean_text(text: str) -> str:
    """Make text encodable as UTF-8: lone surrogates (from JSON escapes or file names) become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def clean_caption(text: str) -> str:
    """Normalise a caption: NFC, no control characters, single spaces, no empty lines.

    A longer caption than classify_caption accepts is cut, so that text from the internet doesn't fill the memory.
    """
    text = clean_text(text).replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", text if text.isascii() else _compile_mark_runs().sub(r"\1", text))
    text = _LINE_BREAKS.sub("\n", _SPACES.sub(" ", _CONTROL_CHARACTERS.sub("", text))).strip()
    return text[: MAX_CAPTION_LENGTH + 2].rstrip()  # still too long, even if the cut is after a space


def classify_caption(caption: str) -> str:
    """Return the outcome of a cleaned caption: ok, no_caption or long_caption."""
    if not any(character.isalnum() for character in caption):
        return "no_caption"
    return "long_caption" if len(caption) > MAX_CAPTION_LENGTH else "ok"


def parse_json_object(text: str) -> dict[str, Any] | None:
    """Parse a JSON object; return None for any other text, also for one that is nested too deeply."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


@lru_cache(maxsize=1)
def _compile_mark_runs() -> re.Pattern[str]:
    """Compile the pattern of MAX_MARKS combining marks with further ones behind them."""
    marks = [code for code in range(sys.maxunicode + 1) if unicodedata.combining(chr(code))]
    ranges = [[code for _, code in run] for _, run in groupby(enumerate(marks), lambda pair: pair[1] - pair[0])]
    mark = "[" + "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in ranges) + "]"
    return re.compile(f"({mark}{{{MAX_MARKS}}}){mark}+")
