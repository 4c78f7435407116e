"""Pretrain the demo's tiny language model: `python -m sailvl_trainer.demo.tiny_lm DIR`, under a minute on one core.

The recipe starts from a pretrained language model that stays frozen while the connector is trained; with random weights
it could not answer, however good the connector. This model is trained on synthetic dialogues in which a grid of tokens
("red circle …") replaces the image, so that it answers from the content between <img> and </img>. A run uses it with
`model.language: DIR`. An existing DIR is kept. Called by `make data`.

Tensor suffixes: B: dialogues in a batch, T: tokens, V: vocabulary.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sailvl_trainer.contract import ModelConfig
from sailvl_trainer.data.chat import IGNORE_INDEX, encode_messages
from sailvl_trainer.data.samples import CAPTION_INSTRUCTION, IMAGE_PLACEHOLDER, Message
from sailvl_trainer.data.synthetic import Scene, choose_question, draw_scene
from sailvl_trainer.model.build import build_config
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import IMAGE_CONTEXT, load_tokenizer

TEXT_SEED = 4
"""Seed of the scenes; no other data set of the demo uses it."""
GRID = 4
"""Side of the token grid; GRID x GRID is the number of image tokens per tile of the preset `tiny`."""
BATCH_SIZE, STEPS, LEARNING_RATE, WARMUP_STEPS = 16, 200, 2e-3, 15

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="directory of the model; an existing one is kept")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    args = parser.parse_args()
    if args.directory.exists():
        return
    loss = pretrain(args.directory, steps=args.steps)
    logger.info("%s: loss %.3f after %d steps", args.directory, loss, args.steps)


def pretrain(directory: Path, *, steps: int) -> float:
    """Train and save model and tokenizer; return the last loss. The result is deterministic on one machine."""
    torch.manual_seed(TEXT_SEED)
    tokenizer = load_tokenizer(ModelConfig(preset="tiny"))
    model = AutoModelForCausalLM.from_config(build_config(get_preset("tiny"), tokenizer).text_config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    loss = float("nan")
    for step, (input_ids_BT, labels_BT) in enumerate(_build_batches(tokenizer, steps)):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 1 - step / steps)
        loss = _train_step(model, optimizer, input_ids_BT, labels_BT)
    _save(model, tokenizer, directory)
    return loss


def describe_as_grid(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return the scene as GRID x GRID tokens, row by row, which replace the image.

    Each quarter holds count, colour and shape of its group in random order; the other cells hold a dot.
    """
    grid = np.full((GRID, GRID), ".", dtype=object)
    half = GRID // 2
    for group in scene.groups:
        count, colour, shape = group.phrase.split()
        cells = rng.permutation([count, colour, shape, colour if rng.random() < 0.5 else shape])
        top = half if group.corner.startswith("bottom") else 0
        left = half if group.corner.endswith("right") else 0
        grid[top : top + half, left : left + half] = cells.reshape(half, half)
    if scene.word:
        grid.flat[rng.choice(np.flatnonzero(grid == "."))] = scene.word
    return [str(word) for word in grid.ravel()]


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save to a temporary directory, then rename it, so that `directory` is always complete."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


def _train_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, input_ids_BT: torch.Tensor, labels_BT: torch.Tensor
) -> float:
    """Update the model once; return the loss before the update."""
    logits_BTV = model(input_ids=input_ids_BT, use_cache=False).logits[:, :-1]
    loss: torch.Tensor = functional.cross_entropy(
        logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _build_batches(tokenizer: PreTrainedTokenizerFast, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield input_ids_BT and labels_BT, padded on the right, so that causal attention never reaches the padding."""
    for step in range(steps):
        rows = [_draw_dialogue(tokenizer, step * BATCH_SIZE + i) for i in range(BATCH_SIZE)]
        length = max(len(ids) for ids, _ in rows)
        input_ids_BT = torch.full((BATCH_SIZE, length), int(tokenizer.pad_token_id))
        labels_BT = torch.full((BATCH_SIZE, length), IGNORE_INDEX)
        for row, (ids, labels) in enumerate(rows):
            input_ids_BT[row, : len(ids)] = torch.from_numpy(ids)
            labels_BT[row, : len(labels)] = torch.from_numpy(labels)
        yield input_ids_BT, labels_BT


def _draw_dialogue(tokenizer: PreTrainedTokenizerFast, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a caption or a question, each with probability one half; return input_ids_T and labels_T."""
    scene, rng = draw_scene(TEXT_SEED, index, 1 + index % 3)
    question, answer = (CAPTION_INSTRUCTION, scene.caption) if rng.random() < 0.5 else choose_question(scene, rng)
    messages = (
        Message(role="user", content=f"{IMAGE_PLACEHOLDER}\n{question}"),
        Message(role="assistant", content=answer),
    )
    encoded = encode_messages(messages, tokenizer, GRID * GRID)
    ids_T = encoded.input_ids_T.copy()
    grid = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in describe_as_grid(scene, rng)]
    ids_T[ids_T == tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)] = grid
    return ids_T, encoded.labels_T


if __name__ == "__main__":
    main()
