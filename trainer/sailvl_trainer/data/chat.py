"""Dialogues as token ids: ChatML roles, one <img>…</img> span for the image, loss on the assistant's turns only.

Text is data: "<img>" or "<|im_end|>" in an alt text becomes ordinary tokens, never a special token of the template.
Called for every sample by the token counter and by collate, and by evaluation for its prompts.
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

IGNORE_INDEX = -100
"""Label of a token without loss, as in torch's cross_entropy."""
TEMPLATE_VERSION = "1"
"""Part of the fingerprint of token counts; increment it when the same dialogue gives other ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedDialogue:
    """A dialogue as token ids and labels of equal length T."""

    input_ids_T: np.ndarray
    """int32."""
    labels_T: np.ndarray
    """int32: the token's own id where there is loss, else IGNORE_INDEX; not shifted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTokenizer:
    """A tokenizer that keeps text and special tokens apart. Thread-safe, since it is never modified."""

    text: Tokenizer
    """Reads the names of special tokens as ordinary text."""
    im_start: int
    im_end: int
    image_start: int
    image_end: int
    image_context: int
    fingerprint: str
    """Hash of the vocabulary, the merges and the template's version."""

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ids: list[int] = self.text.encode(text, add_special_tokens=False).ids
        return ids


@lru_cache(maxsize=8)
def get_chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> ChatTokenizer:
    """Return the chat tokenizer of a tokenizer. Raises ValueError if it lacks the special tokens."""
    serialized = tokenizer.backend_tokenizer.to_str()
    text = Tokenizer.from_str(serialized)
    text.encode_special_tokens = True
    text.no_truncation()
    text.no_padding()
    return ChatTokenizer(
        text=text,
        im_start=_token_id(tokenizer, IM_START),
        im_end=_token_id(tokenizer, IM_END),
        image_start=_token_id(tokenizer, IMAGE_START),
        image_end=_token_id(tokenizer, IMAGE_END),
        image_context=_token_id(tokenizer, IMAGE_CONTEXT),
        fingerprint=hashlib.sha256(f"{TEMPLATE_VERSION}\n{serialized}".encode()).hexdigest()[:16],
    )


def encode_messages(
    messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast, image_tokens: int
) -> EncodedDialogue:
    """Encode a dialogue; `image_tokens` is the number of tokens of its image, 0 without one.

    The image's tokens replace the first placeholder. Raises ValueError for an image without a placeholder.
    """
    ids: list[int] = []
    labels: list[int] = []
    for span, has_loss in _spans(get_chat_tokenizer(tokenizer), messages, image_tokens):
        ids += span
        labels += span if has_loss else [IGNORE_INDEX] * len(span)
    return EncodedDialogue(input_ids_T=np.array(ids, dtype=np.int32), labels_T=np.array(labels, dtype=np.int32))


def encode_prompt(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> list[int]:
    """Encode a dialogue and open the assistant's turn, for generation."""
    chat = get_chat_tokenizer(tokenizer)
    encoded = encode_messages(messages, tokenizer, image_tokens).input_ids_T
    return [*encoded.tolist(), chat.im_start, *chat.encode_text("assistant\n")]


def count_tokens(
    messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast, *, has_image: bool
) -> tuple[int, int]:
    """Return a dialogue's number of tokens, without image tokens, and its number of loss tokens.

    Both depend on the tokenizer and the template alone; image tokens depend on the tiling and are added by the encoder.
    """
    spans = list(_spans(get_chat_tokenizer(tokenizer), messages, int(has_image)))
    tokens = sum(len(span) for span, _ in spans) - int(has_image)
    return tokens, sum(len(span) for span, has_loss in spans if has_loss)


def truncate(encoded: EncodedDialogue, length: int, image_context: int) -> EncodedDialogue:
    """Return the first `length` tokens; if they would cut the image, keep the image and drop text before it instead.

    The number of image tokens never changes: otherwise image features would fill tokens of the next sample of the pack.
    """
    ids_T, labels_T = encoded.input_ids_T, encoded.labels_T
    if len(ids_T) <= length:
        return encoded
    image = np.flatnonzero(ids_T == image_context)
    if image.size and image[-1] + 2 > length:  # 2: the image token itself and </img>
        first, end = int(image[0]) - 1, int(image[-1]) + 2
        indices = np.r_[0 : length - (end - first), first:end]
    else:
        indices = np.arange(length)
    return EncodedDialogue(input_ids_T=ids_T[indices], labels_T=labels_T[indices])


def _spans(chat: ChatTokenizer, messages: tuple[Message, ...], image_tokens: int) -> Iterator[tuple[list[int], bool]]:
    """Yield spans of ids and whether they carry loss, as the assistant's text and its end token do."""
    is_image_done = image_tokens == 0
    for message in messages:
        yield [chat.im_start], False
        if message.role == "assistant":
            yield chat.encode_text("assistant\n"), False
            yield [*chat.encode_text(message.content), chat.im_end], True
            yield chat.encode_text("\n"), False
            continue
        head, placeholder, tail = f"{message.role}\n{message.content}", "", ""
        if message.role == "user" and not is_image_done:
            head, placeholder, tail = head.partition(IMAGE_PLACEHOLDER)
            is_image_done = bool(placeholder)
        yield chat.encode_text(head), False
        if placeholder:
            yield [chat.image_start, *[chat.image_context] * image_tokens, chat.image_end], False
        yield [*chat.encode_text(tail), chat.im_end, *chat.encode_text("\n")], False
    if not is_image_done:
        raise ValueError(f"an image but no {IMAGE_PLACEHOLDER} in a user turn; write it where the image belongs")


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.backend_tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token}; load it with load_tokenizer, which adds the special tokens")
    return int(found)
