"""Generate greedy answers in batches. Called by benchmark.py.

Which questions share a batch depends on their order alone, so that any number of ranks gives the same answers.

Tensor suffixes: B: questions in a batch, T: tokens, N: tiles, 3: RGB, H, W: height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from sailvl_trainer.data.chat import encode_prompt
from sailvl_trainer.data.images import UnreadableImage, open_image
from sailvl_trainer.data.samples import IMAGE_PLACEHOLDER, Message
from sailvl_trainer.data.tiling import choose_grid, cut_tiles
from sailvl_trainer.errors import DataError
from sailvl_trainer.evaluate.tsv import Question
from sailvl_trainer.model.presets import Preset


@dataclass(frozen=True, kw_only=True, slots=True)
class Generator:
    """The model and everything that turns a question into its input."""

    model: InternVLForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    preset: Preset
    device: torch.device
    max_new_tokens: int

    @torch.inference_mode()
    def generate_answers(self, questions: Sequence[Question], max_tiles: int) -> list[str]:
        """Return one answer per question, in order; prompts are padded on the left.

        Raises DataError if an image is truncated.
        """
        prompts, tiles = zip(*(self._encode(question, max_tiles) for question in questions), strict=True)
        length, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids_BT = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=self.device)
        mask_BT = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        pixels = [t for t in tiles if t is not None]
        joined_N3HW = torch.from_numpy(np.concatenate(pixels)).to(self.device) if pixels else None
        output_BT = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            # transformers calls the vision tower if any of its arguments is given
            **({} if joined_N3HW is None else {"pixel_values": joined_N3HW, "vision_feature_layer": -1}),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in output_BT[:, length:]]

    def _encode(self, question: Question, max_tiles: int) -> tuple[list[int], np.ndarray | None]:
        """Return the prompt's token ids and pixels_N3HW, which is None without an image."""
        text = build_prompt(question)
        if not question.images:
            return encode_prompt((Message(role="user", content=text),), self.tokenizer, 0), None
        pixels_N3HW = np.concatenate([self._read_tiles(question, data, max_tiles) for data in question.images])
        message = Message(role="user", content=f"{IMAGE_PLACEHOLDER}\n{text}")
        image_tokens = len(pixels_N3HW) * self.preset.tokens_per_tile
        return encode_prompt((message,), self.tokenizer, image_tokens), pixels_N3HW

    def _read_tiles(self, question: Question, data: bytes, max_tiles: int) -> np.ndarray:
        try:
            image = open_image(data)
        except UnreadableImage as error:
            raise DataError(f"benchmark question {question.index}: {error}; replace the image") from error
        grid = choose_grid(image.width, image.height, max_tiles, self.preset.image_size)
        return cut_tiles(image, grid, self.preset.image_size)


def build_prompt(question: Question) -> str:
    """Return the question with hint and choices in VLMEvalKit's format."""
    lines = [f"Hint: {question.hint}"] if question.hint else []
    lines.append(question.question)
    lines += [f"{letter}. {text}" for letter, text in question.choices.items()]
    if question.choices:
        lines.append("Answer with the option's letter from the given choices directly.")
    return "\n".join(lines)
