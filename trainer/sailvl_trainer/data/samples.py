"""One training sample: a picture, or none, and the dialogue about it. Written by curation, read by the loader."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

IMAGE_MARK = "<image>"
"""Stands in a user turn where the picture belongs; anywhere else it is a word like any other."""
CAPTION_INSTRUCTION = "Describe the image."
KEY = re.compile(r"[^./\x00]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    key: str
    """Unique in its shard; no dot and no slash, as WebDataset asks."""
    image: bytes | None
    """The encoded file as it came."""
    suffix: str
    """Of the encoded file: jpg, png, …"""
    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    """JSON scalars: source, caption, level, …"""


def build_caption(key: str, image: bytes, suffix: str, caption: str, meta: dict[str, Any]) -> Sample:
    """A captioned picture as a dialogue of one question."""
    turns = (
        Message(role="user", content=f"{IMAGE_MARK}\n{CAPTION_INSTRUCTION}"),
        Message(role="assistant", content=caption),
    )
    return build_dialogue(key, image, suffix, turns, meta | {"caption": caption})


def build_dialogue(
    key: str, image: bytes | None, suffix: str, turns: tuple[Message, ...], meta: dict[str, Any]
) -> Sample:
    """A dialogue about a picture. Raises ValueError when picture and mark don't go together."""
    require_mark(turns, has_picture=image is not None)
    return Sample(key=key, image=image, suffix=suffix, messages=turns, meta=meta)


def require_mark(turns: Iterable[Message], *, has_picture: bool) -> None:
    """Raises ValueError unless the user's turns hold one mark for a picture and none without."""
    marks = sum(turn.content.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if marks != int(has_picture):
        picture = "a picture" if has_picture else "no picture"
        raise ValueError(
            f"{marks} {IMAGE_MARK} marks in the user's turns and {picture}; write one mark for a picture, none without"
        )
