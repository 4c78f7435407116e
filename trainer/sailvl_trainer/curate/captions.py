"""Captions as training will see them, or why one is no caption; called by verify.py. Alt-texts are captions too."""

from __future__ import annotations

import re
import unicodedata

from sailvl_trainer.curate.items import clean_text

MAX_CAPTION = 4000
"""Characters; about a thousand tokens, beyond which web text is a page rather than a caption."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\ufeff]")
_SPACES = re.compile(r"[^\S\n]+")
_LINES = re.compile(r" ?\n[ \n]*")


def clean_caption(text: str) -> str:
    """NFC, no control characters, single spaces, no empty lines."""
    text = unicodedata.normalize("NFC", clean_text(text).replace("\r\n", "\n").replace("\r", "\n"))
    return _LINES.sub("\n", _SPACES.sub(" ", _CONTROLS.sub("", text))).strip()


def judge_caption(caption: str) -> str:
    """The outcome of a clean caption: ok, no_caption or long_caption."""
    if not any(character.isalnum() for character in caption):
        return "no_caption"
    return "long_caption" if len(caption) > MAX_CAPTION else "ok"
