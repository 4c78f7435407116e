"""Samples as token ids: how a sample is encoded, and how long it will be, computed from its row in the shard's index.

Called by the dataset (lengths), by collate (ids), and by curation, which stores token counts in the index.
Suffixes: R rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from sailvl_trainer.data.chat import EncodedDialogue, count_tokens, encode_messages, get_chat_tokenizer, truncate
from sailvl_trainer.data.samples import Message, check_image_placeholder
from sailvl_trainer.data.shards import ShardReader
from sailvl_trainer.data.tiles import choose_grid, choose_grids
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.model.presets import Preset

LENGTHS = np.dtype([("tokens", np.int32), ("tiles", np.int16), ("is_truncated", np.bool_)])
"""Lengths of a sample: its tokens, image tokens included; its tiles with the thumbnail; whether it is truncated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCounter:
    """Counts the tokens of dialogues. Curation stores the counts in the shard index, so that training needn't count."""

    tokenizer: PreTrainedTokenizerFast

    @property
    def fingerprint(self) -> str:
        """Hash of everything that a count depends on: the tokenizer and the chat template."""
        return get_chat_tokenizer(self.tokenizer).fingerprint

    def count(self, messages: tuple[Message, ...], *, has_image: bool) -> tuple[int, int]:
        """Return a dialogue's number of tokens, without image tokens, and its number of loss tokens."""
        return count_tokens(messages, self.tokenizer, has_image=has_image)

    def count_shard(self, reader: ShardReader, on_row: Callable[[int], None] = lambda row: None) -> np.ndarray:
        """Return the text tokens of all rows, int32; images aren't read. `on_row` is called after each row.

        Raises DataError that names the shard and the record that can't be counted.
        """
        text_tokens_R = np.empty(len(reader), dtype=np.int32)
        has_image_R = reader.column("image_size") > 0
        for row in range(len(reader)):
            try:
                text_tokens_R[row], _ = self.count(reader.messages(row), has_image=bool(has_image_R[row]))
            except ValueError as error:
                raise reader.error(row, error) from error
            on_row(row)
        return text_tokens_R


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleEncoder:
    """Encodes samples; holds everything that their lengths depend on."""

    tokenizer: PreTrainedTokenizerFast
    preset: Preset
    max_tiles: int
    """Maximum number of tiles of an image, without the thumbnail."""
    pack_tokens: int
    """Length of a pack in tokens; longer samples are truncated."""

    def __post_init__(self) -> None:
        least = 2 * self.preset.tokens_per_tile
        if self.pack_tokens < least:
            raise ConfigError(
                f"packTokens is {self.pack_tokens}, but a tile of preset {self.preset.name} has "
                f"{self.preset.tokens_per_tile} tokens; set at least {least}"
            )

    @property
    def fingerprint(self) -> str:
        """Text that differs if any sample's length may differ."""
        tiling = f"{self.preset.image_size} {self.preset.tokens_per_tile} {self._tile_limit} {self.pack_tokens}"
        return f"{self.counter.fingerprint} {tiling}"

    @property
    def counter(self) -> TokenCounter:
        """The counter of the same tokenizer."""
        return TokenCounter(tokenizer=self.tokenizer)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the columns and rows of tiles of an image; at least half of a pack is left for the text."""
        return choose_grid(width, height, self._tile_limit, self.preset.image_size)

    def encode(self, reader: ShardReader, row: int, tiles: int) -> EncodedDialogue:
        """Return a sample's ids and labels, truncated to a pack; its image isn't read. Raises DataError."""
        messages = reader.messages(row)
        try:
            check_image_placeholder(messages, has_image=tiles > 0)
        except ValueError as error:
            raise reader.error(row, error) from error
        encoded = encode_messages(messages, self.tokenizer, tiles * self.preset.tokens_per_tile)
        return truncate(encoded, self.pack_tokens, get_chat_tokenizer(self.tokenizer).image_context)

    def measure(self, reader: ShardReader, text_tokens_R: np.ndarray) -> np.ndarray:
        """Return the LENGTHS of all rows of a shard, given their tokens without image tokens."""
        lengths_R = np.empty(len(reader), dtype=LENGTHS)
        cols_R, rows_R = choose_grids(
            reader.column("width"), reader.column("height"), self._tile_limit, self.preset.image_size
        )
        tiles_R = np.where(reader.column("image_size") > 0, cols_R * rows_R + (cols_R * rows_R > 1), 0)
        tokens_R = text_tokens_R + tiles_R * self.preset.tokens_per_tile
        lengths_R["tiles"], lengths_R["is_truncated"] = tiles_R, tokens_R > self.pack_tokens
        lengths_R["tokens"] = np.minimum(tokens_R, self.pack_tokens)
        return lengths_R

    @property
    def _tile_limit(self) -> int:
        return min(self.max_tiles, max(1, self.pack_tokens // 2 // self.preset.tokens_per_tile - 1))
