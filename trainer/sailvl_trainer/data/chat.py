"""Dialogues as token ids: ChatML roles, one <img>…</img> span for the picture, loss on the assistant's turns only.

Words are data: "<img>" or "<|im_end|>" in an alt-text becomes ordinary characters, never a mark of the template.
Called for every sample by the index (to count) and by collate (to train), and by evaluation for its prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sailvl_trainer.data.samples import IMAGE_PLACEHOLDER, Message
from sailvl_trainer.model.tokenizer import IM_END, IM_START, IMAGE_CONTEXT, IMAGE_END, IMAGE_START

IGNORE = -100
"""Label of a position without loss."""
TEMPLATE_VERSION = "1"
"""Part of the fingerprint of token counts: raise it when the same dialogue gives other ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    input_ids_T: np.ndarray
    """int32."""
    labels_T: np.ndarray
    """int32, the id itself where there is loss, else IGNORE; not shifted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A tokenizer's words and marks apart; safe to use from several threads, as nothing in it is ever set."""

    words: Tokenizer
    """Reads special tokens as ordinary characters."""
    im_start: int
    im_end: int
    image_start: int
    image_end: int
    image_context: int
    fingerprint: str
    """Changes with the vocabulary, the merges and the template."""

    def encode_words(self, text: str) -> list[int]:
        """Ids of a text without marks."""
        ids: list[int] = self.words.encode(text, add_special_tokens=False).ids
        return ids


@lru_cache(maxsize=8)
def build_template(tokenizer: PreTrainedTokenizerFast) -> Template:
    """The template over a tokenizer. Raises ValueError for one without the special tokens."""
    text = tokenizer.backend_tokenizer.to_str()
    words = Tokenizer.from_str(text)
    words.encode_special_tokens = True
    words.no_truncation()
    words.no_padding()
    return Template(
        words=words,
        im_start=_mark(tokenizer, IM_START),
        im_end=_mark(tokenizer, IM_END),
        image_start=_mark(tokenizer, IMAGE_START),
        image_end=_mark(tokenizer, IMAGE_END),
        image_context=_mark(tokenizer, IMAGE_CONTEXT),
        fingerprint=hashlib.sha256(f"{TEMPLATE_VERSION}\n{text}".encode()).hexdigest()[:16],
    )


def encode_messages(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> Encoded:
    """A dialogue; `image_tokens`: positions of its picture, 0 without. The first mark is the picture's place.

    Raises ValueError for a picture without a mark in a user turn.
    """
    ids: list[int] = []
    labels: list[int] = []
    for part, has_loss in _spans(build_template(tokenizer), messages, image_tokens):
        ids += part
        labels += part if has_loss else [IGNORE] * len(part)
    return Encoded(input_ids_T=np.array(ids, dtype=np.int32), labels_T=np.array(labels, dtype=np.int32))


def encode_prompt(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> list[int]:
    """A dialogue that the assistant is to go on with."""
    template = build_template(tokenizer)
    encoded = encode_messages(messages, tokenizer, image_tokens).input_ids_T
    return [*encoded.tolist(), template.im_start, *template.encode_words("assistant\n")]


def count_positions(
    messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast, *, has_picture: bool
) -> tuple[int, int]:
    """A dialogue's positions, those of its picture not counted, and how many of them carry loss.

    They depend on the tokenizer and the template alone; tiles are added by whoever knows the tiling.
    """
    spans = list(_spans(build_template(tokenizer), messages, int(has_picture)))
    positions = sum(len(part) for part, _ in spans) - int(has_picture)
    return positions, sum(len(part) for part, has_loss in spans if has_loss)


def cut(encoded: Encoded, length: int, image_context: int) -> Encoded:
    """The first `length` positions; a picture that would be cut is kept whole, and words before it go instead.

    So the number of picture positions never changes: features would else land in the wrong sample of a pack.
    """
    ids_T, labels_T = encoded.input_ids_T, encoded.labels_T
    if len(ids_T) <= length:
        return encoded
    picture = np.flatnonzero(ids_T == image_context)
    if picture.size and picture[-1] + 2 > length:  # 2: the position itself and </img>
        first, end = int(picture[0]) - 1, int(picture[-1]) + 2
        kept = np.r_[0 : length - (end - first), first:end]
    else:
        kept = np.arange(length)
    return Encoded(input_ids_T=ids_T[kept], labels_T=labels_T[kept])


def _spans(template: Template, messages: tuple[Message, ...], image_tokens: int) -> Iterator[tuple[list[int], bool]]:
    """The turns' ids, and whether they carry loss: the assistant's words and its end mark."""
    is_shown = image_tokens == 0
    for message in messages:
        yield [template.im_start], False
        if message.role == "assistant":
            yield template.encode_words("assistant\n"), False
            yield [*template.encode_words(message.content), template.im_end], True
            yield template.encode_words("\n"), False
            continue
        head, mark, tail = f"{message.role}\n{message.content}", "", ""
        if message.role == "user" and not is_shown:
            head, mark, tail = head.partition(IMAGE_PLACEHOLDER)
            is_shown = bool(mark)
        yield template.encode_words(head), False
        if mark:
            yield [template.image_start, *[template.image_context] * image_tokens, template.image_end], False
        yield [*template.encode_words(tail), template.im_end, *template.encode_words("\n")], False
    if not is_shown:
        raise ValueError(f"a picture and no {IMAGE_PLACEHOLDER} in a user turn; write it where the picture belongs")


def _mark(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.backend_tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token}; load it with load_tokenizer, which adds the marks")
    return int(found)
