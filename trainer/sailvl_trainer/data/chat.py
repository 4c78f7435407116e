"""Dialogues as token ids: ChatML roles, one <img>…</img> span for the picture, loss on the assistant's turns only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from sailvl_trainer.data.samples import IMAGE_MARK, Message
from sailvl_trainer.model.tokenizer import IM_END, IM_START, IMAGE_CONTEXT, IMAGE_END, IMAGE_START

IGNORE = -100
"""Label of a position without loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    input_ids_T: np.ndarray
    """int32."""
    labels_T: np.ndarray
    """int32, the id itself where there is loss, else IGNORE; not shifted."""


def encode_messages(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> Encoded:
    """A dialogue; `image_tokens`: positions of its picture, 0 without."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        for text, has_loss in _spans(message, image_tokens):
            part = tokenizer.encode(text, add_special_tokens=False)
            ids += part
            labels += part if has_loss else [IGNORE] * len(part)
    return Encoded(input_ids_T=np.array(ids, dtype=np.int32), labels_T=np.array(labels, dtype=np.int32))


def encode_prompt(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> list[int]:
    """A dialogue that the assistant is to go on with."""
    encoded = encode_messages(messages, tokenizer, image_tokens).input_ids_T
    return [*encoded.tolist(), *tokenizer.encode(f"{IM_START}assistant\n", add_special_tokens=False)]


def _spans(message: Message, image_tokens: int) -> list[tuple[str, bool]]:
    """A turn's texts, and whether each carries loss: the assistant's words and its end mark."""
    picture = f"{IMAGE_START}{IMAGE_CONTEXT * image_tokens}{IMAGE_END}"
    content = message.content.replace(IMAGE_MARK, picture)
    head = f"{IM_START}{message.role}\n"
    if message.role == "assistant":
        return [(head, False), (content + IM_END, True), ("\n", False)]
    return [(f"{head}{content}{IM_END}\n", False)]
