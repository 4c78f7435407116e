"""Answers of the model: generated greedily in batches, and kept in files for later attempts. Called by benchmark.py.

Which questions share a batch depends on their order alone, so that any number of ranks gives the same answers.

The cache consists of JSON lines below <output>/artifacts, one file per rank and attempt. Answers are keyed by benchmark
and by a hash of the batch's questions, so that they are reused on any rank but never for changed questions. A truncated
line, which a rank was writing when it died, is ignored.

Tensor suffixes: B: questions in a batch, T: tokens, N: tiles, 3: RGB, H, W: height and width in pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from sailvl_trainer.data.chat import encode_prompt
from sailvl_trainer.data.image_structure import InvalidImage
from sailvl_trainer.data.images import open_image
from sailvl_trainer.data.samples import IMAGE_PLACEHOLDER, Message
from sailvl_trainer.data.tiles import choose_grid, cut_tiles
from sailvl_trainer.errors import DataError
from sailvl_trainer.evaluate.tsv import Question
from sailvl_trainer.model.presets import Preset
from sailvl_trainer.rank.collectives import broadcast_value
from sailvl_trainer.rank.context import Context
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.documents import iterate_lines
from sailvl_trainer.storage.files import translate_storage_errors


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
        size = self.preset.image_size
        try:
            with open_image(data, resized_width=max_tiles * size) as image:
                return cut_tiles(image, choose_grid(image.width, image.height, max_tiles, size), size)
        except InvalidImage as error:
            raise DataError(f"benchmark question {question.index}: {error}; replace the image") from error


def build_prompt(question: Question) -> str:
    """Return the question with hint and choices in VLMEvalKit's format."""
    lines = [f"Hint: {question.hint}"] if question.hint else []
    lines.append(question.question)
    lines += [f"{letter}. {text}" for letter, text in question.choices.items()]
    if question.choices:
        lines.append("Answer with the option's letter from the given choices directly.")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class _CachedBatch:
    """One line of a file of the cache."""

    benchmark: str
    batch: str
    """Hash of the batch's questions."""
    answers: list[str]


class AnswerCache:
    """The answers of one evaluate stage. COLLECTIVE: every rank creates one, and all see the same earlier answers."""

    def __init__(self, context: Context) -> None:
        folder = context.files.output / "artifacts"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"answers-{context.stage.attempt:04d}-{context.rank:05d}.jsonl"
        batches = broadcast_value(list[_CachedBatch], _read_batches(folder) if context.is_first else None)
        self._answers = {(found.benchmark, found.batch): found.answers for found in batches}

    def find(self, benchmark: str, batch: Sequence[Question]) -> list[str] | None:
        """Return the answers of an earlier attempt to these questions, or None."""
        found = self._answers.get((benchmark, _hash_batch(batch)))
        return found if found is not None and len(found) == len(batch) else None

    def add(self, benchmark: str, batch: Sequence[Question], answers: list[str]) -> None:
        """Append a batch's answers to this rank's file; they are on the disk on return. Raises StorageError."""
        line = _CachedBatch(benchmark=benchmark, batch=_hash_batch(batch), answers=answers)
        with translate_storage_errors(self._path), self._path.open("ab") as file:
            file.write(encode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _hash_batch(batch: Sequence[Question]) -> str:
    return hashlib.sha256(encode(batch)).hexdigest()


def _read_batches(folder: Path) -> list[_CachedBatch]:
    """Return the batches that earlier attempts answered, oldest first."""
    roots = DataRoots.resolve(folder)
    return [
        batch for path in sorted(folder.glob("answers-*.jsonl")) for batch in iterate_lines(_CachedBatch, path, roots)
    ]
