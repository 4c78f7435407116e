"""A tiny language model that has read something: `python -m sailvl_trainer.demo.tiny_lm DIR`, under a minute on a core.

The recipe starts from a pretrained language model, which stays frozen while the connector learns; random weights could
not answer whatever the connector says. This one reads dialogues of the procedural generator in which a picture is a
grid of words ("red circle …"), so that it answers from what stands between <img> and </img>. `model.language: DIR`.
A folder that is there already is left as it is.
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
from sailvl_trainer.data.chat import IGNORE, encode_messages
from sailvl_trainer.data.samples import CAPTION_INSTRUCTION, IMAGE_MARK, Message
from sailvl_trainer.data.synthetic import Scene, ask, draw_scene
from sailvl_trainer.model.build import build_config
from sailvl_trainer.model.presets import preset
from sailvl_trainer.model.tokenizer import IMAGE_CONTEXT, load_tokenizer

TEXT_SEED = 4
"""Scenes that no other set is drawn from."""
GRID = 4
"""Words a side: as many as a tile of `tiny` has positions."""
ROWS, STEPS, RATE, WARMUP = 16, 200, 2e-3, 15

logger = logging.getLogger(__name__)


def main() -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    args = parser.parse_args()
    if args.directory.exists():
        return
    loss = train(args.directory, steps=args.steps)
    logger.info("%s: loss %.3f after %d steps", args.directory, loss, args.steps)


def train(directory: Path, *, steps: int) -> float:
    """Train and save model and tokenizer; the last loss. The same arguments give the same model on a machine."""
    torch.manual_seed(TEXT_SEED)
    tokenizer = load_tokenizer(ModelConfig(preset="tiny"))
    model = AutoModelForCausalLM.from_config(build_config(preset("tiny"), tokenizer).text_config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    loss = float("nan")
    for step, (input_ids_BT, labels_BT) in enumerate(_batches(tokenizer, steps)):
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 1 - step / steps)
        loss = _step(model, optimizer, input_ids_BT, labels_BT)
    _save(model, tokenizer, directory)
    return loss


def spell(scene: Scene, rng: np.random.Generator) -> list[str]:
    """A scene as GRID x GRID words, row by row: each quarter says what is in it, in any order; else it is blank."""
    grid = np.full((GRID, GRID), ".", dtype=object)
    half = GRID // 2
    for group in scene.groups:
        count, colour, shape = group.words.split()
        words = rng.permutation([count, colour, shape, colour if rng.random() < 0.5 else shape])
        top = half if group.place.startswith("bottom") else 0
        left = half if group.place.endswith("right") else 0
        grid[top : top + half, left : left + half] = words.reshape(half, half)
    if scene.word:
        grid.flat[rng.choice(np.flatnonzero(grid == "."))] = scene.word
    return [str(word) for word in grid.ravel()]


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Beside its place, then renamed: a folder of this name is whole."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


def _step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, input_ids_BT: torch.Tensor, labels_BT: torch.Tensor
) -> float:
    logits_BTV = model(input_ids=input_ids_BT, use_cache=False).logits[:, :-1]
    loss: torch.Tensor = functional.cross_entropy(
        logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORE
    )
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _batches(tokenizer: PreTrainedTokenizerFast, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded on the right, where causal attention never looks."""
    for step in range(steps):
        rows = [_draw(tokenizer, step * ROWS + i) for i in range(ROWS)]
        length = max(len(ids) for ids, _ in rows)
        input_ids_BT = torch.full((ROWS, length), int(tokenizer.pad_token_id))
        labels_BT = torch.full((ROWS, length), IGNORE)
        for row, (ids, labels) in enumerate(rows):
            input_ids_BT[row, : len(ids)] = torch.from_numpy(ids)
            labels_BT[row, : len(labels)] = torch.from_numpy(labels)
        yield input_ids_BT, labels_BT


def _draw(tokenizer: PreTrainedTokenizerFast, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One dialogue about a scene, its ids and labels: half of them captions, half questions."""
    scene, rng = draw_scene(TEXT_SEED, index, 1 + index % 3)
    question, answer = (CAPTION_INSTRUCTION, scene.caption) if rng.random() < 0.5 else ask(scene, rng)
    turns = (
        Message(role="user", content=f"{IMAGE_MARK}\n{question}"),
        Message(role="assistant", content=answer),
    )
    encoded = encode_messages(turns, tokenizer, GRID * GRID)
    ids = encoded.input_ids_T.copy()
    words = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in spell(scene, rng)]
    ids[ids == tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)] = words
    return ids, encoded.labels_T


if __name__ == "__main__":
    main()
