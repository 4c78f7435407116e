"""Greedy answers in batches. Which questions share a batch depends on their order alone, not on the number of ranks, so
that one and two workers give the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from sailvl_trainer.data.chat import encode_prompt
from sailvl_trainer.data.images import open_image
from sailvl_trainer.data.samples import IMAGE_MARK, Message
from sailvl_trainer.data.tiling import choose_grid, count_tiles, cut_tiles
from sailvl_trainer.evaluate.tsv import Question
from sailvl_trainer.model.presets import Preset


@dataclass(frozen=True, kw_only=True, slots=True)
class Generator:
    model: InternVLForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    preset: Preset
    device: torch.device
    max_new_tokens: int

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], max_tiles: int) -> list[str]:
        """One answer a question, in order; prompts are padded on the left."""
        prompts, tiles = zip(*(self._encode(question, max_tiles) for question in questions), strict=True)
        length, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids_BT = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=self.device)
        mask_BT = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        pixels = [t for t in tiles if t is not None]
        output_BT = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            pixel_values=torch.from_numpy(np.concatenate(pixels)).to(self.device) if pixels else None,
            vision_feature_layer=-1,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in output_BT[:, length:]]

    def _encode(self, question: Question, max_tiles: int) -> tuple[list[int], np.ndarray | None]:
        text, pixels, image_tokens = build_prompt(question), None, 0
        if question.image is not None:
            image = open_image(question.image)
            grid = choose_grid(image.width, image.height, max_tiles, self.preset.image_size)
            pixels = cut_tiles(image, grid, self.preset.image_size)
            image_tokens = count_tiles(grid) * self.preset.tokens_per_tile
            text = f"{IMAGE_MARK}\n{text}"
        return encode_prompt((Message(role="user", content=text),), self.tokenizer, image_tokens), pixels


def build_prompt(question: Question) -> str:
    """The question, with its hint and choices as VLMEvalKit writes them."""
    lines = [f"Hint: {question.hint}"] if question.hint else []
    lines.append(question.question)
    lines += [f"{letter}. {text}" for letter, text in question.choices.items()]
    if question.choices:
        lines.append("Answer with the option's letter from the given choices directly.")
    return "\n".join(lines)
