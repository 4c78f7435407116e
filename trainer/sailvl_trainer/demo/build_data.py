"""Build the demo's raw data: `python -m sailvl_trainer.demo.build_data DIR [--stamps TREE]`.

Writes the image folders DIR/raw/stamps and DIR/raw/shapes, the training sets DIR/sft/{knowledge,instruction,preference}
of rising difficulty, and the benchmarks DIR/benchmarks/*.tsv in VLMEvalKit's format. The same arguments give the same
bytes. Called by `make data`; tests use the functions.
"""

from __future__ import annotations

import argparse
import base64
import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sailvl_trainer.contract import HELD_OUT_DIR, SHARDS_DIR, ModelConfig
from sailvl_trainer.data.encoder import TokenCounter
from sailvl_trainer.data.shards import ShardWriter
from sailvl_trainer.data.synthetic import SIDE, choose_question, draw_caption, draw_question, draw_scene, render_scene
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.storage.shard_manifest import write_shard_manifest

SFT_LEVELS = {"knowledge": 1, "instruction": 2, "preference": 3}
BENCHMARK_SEED, SFT_SEED, CAPTION_SEED = 3, 2, 1


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="directory to write to")
    parser.add_argument("--stamps", type=Path, help="unpacked tuxpaint-stamps-default package; omit to skip the stamps")
    parser.add_argument("--shapes", type=int, default=1500, help="captioned images of shapes (default: 1500)")
    parser.add_argument("--questions", type=int, default=1000, help="questions per fine-tuning set (default: 1000)")
    parser.add_argument("--benchmark", type=int, default=48, help="questions per benchmark (default: 48)")
    args = parser.parse_args()
    make_all(args.directory, args.stamps, shapes=args.shapes, questions=args.questions, benchmark=args.benchmark)


def make_all(directory: Path, stamps: Path | None, *, shapes: int, questions: int, benchmark: int) -> None:
    """Write all data sets and print their sizes; files of the same name are overwritten."""
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
    """Write an image folder of NAME.png and NAME.txt, two thirds of level 1 and one third of level 2.

    Returns the number of images.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        sample = draw_caption(CAPTION_SEED, index, 2 if index % 3 == 2 else 1)
        assert sample.image is not None, "every synthetic sample has an image"
        (directory / f"{sample.key}.png").write_bytes(sample.image)
        (directory / f"{sample.key}.txt").write_text(sample.meta["caption"])
    return number


def make_questions(directory: Path, level: int, number: int) -> int:
    """Write shards of `number` samples, every tenth a caption and the rest questions, and held-out ones of a twentieth.

    Returns the number of samples, held-out ones included.
    """
    held_out, counter = max(8, number // 20), TokenCounter(tokenizer=load_tokenizer(ModelConfig(preset="tiny")))
    for split, first, count in ((SHARDS_DIR, 0, number), (HELD_OUT_DIR, number, held_out)):
        with ShardWriter(directory / split, "00000", counter) as writer:
            for index in range(first, first + count):
                draw = draw_caption if index % 10 == 0 else draw_question
                writer.write(draw(SFT_SEED, index, level), (SIDE, SIDE))
        assert writer.info is not None, "the writer is closed"
        write_shard_manifest(directory / split, [writer.info])
    return number + held_out


def make_benchmark(path: Path, level: int, number: int) -> int:
    """Write a TSV of questions that occur in no training set; return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("index", "image", "question", "answer"))
        for index in range(number):
            scene, rng = draw_scene(BENCHMARK_SEED, index, level)
            image = base64.b64encode(render_scene(scene, rng)).decode()
            writer.writerow((index, image, *choose_question(scene, rng)))
    return number


def copy_stamps(tree: Path, directory: Path) -> int:
    """Copy the stamps of Debian's tuxpaint-stamps-default as an image folder of NAME.png and NAME.txt.

    Stamps without an image or an English caption are left out. Returns the number of stamps.
    """
    directory.mkdir(parents=True, exist_ok=True)
    count = 0
    for image, caption in find_stamps(tree):
        name = build_stamp_name(image)
        shutil.copyfile(image, directory / f"{name}.png")
        (directory / f"{name}.txt").write_text(caption, encoding="utf-8")
        count += 1
    return count


def find_stamps(tree: Path) -> Iterator[tuple[Path, str]]:
    """Yield image path and caption of each stamp, in the order of paths.

    The English caption is the first line of a stamp's text file; translations follow it.
    """
    for text in sorted(tree.rglob("*.txt")):
        image = text.with_suffix(".png")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        if image.exists() and lines and lines[0].strip():
            yield image, lines[0].strip()


def build_stamp_name(image: Path) -> str:
    """Join the last three parts of the image's path to a valid WebDataset key."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(image.with_suffix("").parts[-3:]).lower()).strip("-")


if __name__ == "__main__":
    main()
