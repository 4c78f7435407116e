"""The training sample: an image or none, and the dialogue about it. Written by curation, read by training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from sailvl_trainer.storage.codec import decode

IMAGE_PLACEHOLDER = "<image>"
"""Marks the position of the image in a user turn. In any other turn it is ordinary text."""
CAPTION_INSTRUCTION = "Describe the image."
SAMPLE_KEY = re.compile(r"[^./\x00]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A dialogue with at most one image."""

    key: str
    """Unique within its shard. It holds no dot and no slash, because WebDataset splits names there."""
    image: bytes | None
    """The encoded image file, unchanged; None for a sample of text alone."""
    suffix: str
    """File name suffix of the image's format: jpg, png, …"""
    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    """JSON scalars such as source, caption and level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Dialogue:
    """Content of a sample's KEY.json."""

    messages: tuple[Message, ...]
    meta: dict[str, Any]


def build_caption_sample(key: str, image: bytes, suffix: str, caption: str, meta: dict[str, Any]) -> Sample:
    """Build a sample in which the user asks for a description and the assistant answers with the caption."""
    messages = (
        Message(role="user", content=f"{IMAGE_PLACEHOLDER}\n{CAPTION_INSTRUCTION}"),
        Message(role="assistant", content=caption),
    )
    return build_dialogue_sample(key, image, suffix, messages, meta | {"caption": caption})


def build_dialogue_sample(
    key: str, image: bytes | None, suffix: str, messages: tuple[Message, ...], meta: dict[str, Any]
) -> Sample:
    """Build a sample from a dialogue. Raises ValueError if image and placeholder don't match."""
    check_image_placeholder(messages, has_image=image is not None)
    return Sample(key=key, image=image, suffix=suffix, messages=messages, meta=meta)


def check_image_placeholder(messages: Iterable[Message], *, has_image: bool) -> None:
    """Raise ValueError unless the user turns hold exactly one placeholder with an image, and none without."""
    count = sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages if message.role == "user")
    if count != int(has_image):
        expected = "exactly one for the sample's image" if has_image else "none, as the sample has no image"
        raise ValueError(f"found {count} {IMAGE_PLACEHOLDER} placeholders in the user turns; write {expected}")


def encode_dialogue(sample: Sample) -> bytes:
    """Return the JSON of a sample's messages and metadata; equal samples give equal bytes."""
    turns = [{"role": m.role, "content": m.content} for m in sample.messages]
    return json.dumps({"messages": turns, "meta": sample.meta}, ensure_ascii=False, sort_keys=True).encode()


def decode_dialogue(data: bytes) -> tuple[tuple[Message, ...], dict[str, Any]]:
    """Return messages and metadata of a dialogue's JSON. Raises ValueError for other JSON."""
    dialogue = decode(_Dialogue, data)
    return dialogue.messages, dialogue.meta
