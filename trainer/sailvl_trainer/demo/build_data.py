"""Builds the demo's raw data: `python -m sailvl_trainer.demo.build_data DIR [--stamps TREE]`.

DIR/raw/stamps, DIR/raw/shapes (image folders), DIR/sft/{knowledge,instruction,preference} (prepared sets of rising
difficulty) and DIR/benchmarks/*.tsv (VLMEvalKit's format). The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import csv
from pathlib import Path

from sailvl_trainer.contract import HELD_OUT_DIR, SHARDS_DIR, ModelConfig
from sailvl_trainer.data.dataset import TokenCounter
from sailvl_trainer.data.shards import ShardWriter, write_manifest
from sailvl_trainer.data.synthetic import SIDE, ask, draw_caption, draw_question, draw_scene, render
from sailvl_trainer.demo.tuxpaint import copy_stamps
from sailvl_trainer.model.tokenizer import load_tokenizer

SFT_LEVELS = {"knowledge": 1, "instruction": 2, "preference": 3}
BENCHMARK_SEED, SFT_SEED, CAPTION_SEED = 3, 2, 1


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--stamps", type=Path, help="an unpacked tuxpaint-stamps-default package")
    parser.add_argument("--shapes", type=int, default=1500, help="captioned pictures a level 1 and 2 (default 1500)")
    parser.add_argument("--questions", type=int, default=1000, help="questions a fine-tuning set (default 1000)")
    parser.add_argument("--benchmark", type=int, default=48, help="questions a benchmark (default 48)")
    args = parser.parse_args()
    make_all(args.directory, args.stamps, shapes=args.shapes, questions=args.questions, benchmark=args.benchmark)


def make_all(directory: Path, stamps: Path | None, *, shapes: int, questions: int, benchmark: int) -> None:
    """All of it; a set that is there already is left as it is."""
    raw = directory / "raw"
    counts = {"shapes": make_shapes(raw / "shapes", shapes)}
    if stamps is not None:
        counts["stamps"] = copy_stamps(stamps, raw / "stamps")
    for name, level in SFT_LEVELS.items():
        counts[name] = make_questions(directory / "sft" / name, level, questions)
        counts[f"level-{level}.tsv"] = make_benchmark(directory / "benchmarks" / f"level-{level}.tsv", level, benchmark)
    for name, count in counts.items():
        print(f"{name:16} {count:6} samples")  # noqa: T201  # a command


def make_shapes(directory: Path, number: int) -> int:
    """An image folder: NAME.png and NAME.txt; two thirds of level 1, the rest of level 2."""
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        sample = draw_caption(CAPTION_SEED, index, 2 if index % 3 == 2 else 1)
        assert sample.image is not None, "every drawn sample has a picture"
        (directory / f"{sample.key}.png").write_bytes(sample.image)
        (directory / f"{sample.key}.txt").write_text(sample.meta["caption"])
    return number


def make_questions(directory: Path, level: int, number: int) -> int:
    """A prepared set: questions with exact answers, one in ten a caption, one in twenty held out."""
    held_out, counter = max(8, number // 20), TokenCounter(tokenizer=load_tokenizer(ModelConfig(preset="tiny")))
    for split, first, count in ((SHARDS_DIR, 0, number), (HELD_OUT_DIR, number, held_out)):
        with ShardWriter(directory / split, "00000", counter) as writer:
            for index in range(first, first + count):
                draw = draw_caption if index % 10 == 0 else draw_question
                writer.write(draw(SFT_SEED, index, level), (SIDE, SIDE))
        assert writer.info is not None, "the block ended"
        write_manifest(directory / split, [writer.info])
    return number + held_out


def make_benchmark(path: Path, level: int, number: int) -> int:
    """A TSV of questions that no training set has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("index", "image", "question", "answer"))
        for index in range(number):
            scene, rng = draw_scene(BENCHMARK_SEED, index, level)
            image = base64.b64encode(render(scene, rng)).decode()
            writer.writerow((index, image, *ask(scene, rng)))
    return number


if __name__ == "__main__":
    main()
