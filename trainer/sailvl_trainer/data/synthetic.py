"""Pictures drawn by rule, with captions and questions whose answers are exact: shapes, colours, counts, places, words.

Every sample is a pure function of (seed, index, level), so a data set needs no files and is the same on every machine.
Level 1: one shape. Level 2: a count and a place. Level 3: two kinds of shapes and a written word.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sailvl_trainer.data.samples import Message, Sample, build_caption, build_dialogue

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
    "pink": (245, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("zero", "one", "two", "three", "four")
PLACES = ("top left", "top right", "bottom left", "bottom right")
WORDS = ("cat", "dog", "sun", "map", "key", "tea", "box", "red", "top", "ice")
SIDE = 112
"""Pixels of a picture's side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Some shapes of one kind and colour in one corner of the picture."""

    shape: str
    colour: str
    count: int
    place: str

    @property
    def words(self) -> str:
        """As a caption says it: "two red circles"."""
        plural = "" if self.count == 1 else "es" if self.shape.endswith("s") else "s"
        return f"{COUNTS[self.count]} {self.colour} {self.shape}{plural}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    groups: tuple[Group, ...]
    word: str = ""

    @property
    def caption(self) -> str:
        """All that is in the picture, in one sentence."""
        parts = " and ".join(f"{g.words} at the {g.place}" for g in self.groups)
        return f"{parts} and the word {self.word}." if self.word else f"{parts}."


def draw_scene(seed: int, index: int, level: int) -> tuple[Scene, np.random.Generator]:
    """What sample `index` shows, and the generator for whatever else is drawn for it."""
    if level not in (1, 2, 3):
        raise ValueError(f"level is {level}; write 1, 2 or 3")
    rng = np.random.default_rng((seed, level, index))
    places = rng.permutation(PLACES)
    groups = tuple(
        Group(
            shape=str(rng.choice(SHAPES)),
            colour=str(rng.choice(tuple(COLOURS))),
            count=1 if level == 1 else int(rng.integers(1, 5)),
            place=str(places[i]),
        )
        for i in range(2 if level == 3 else 1)
    )
    return Scene(groups=groups, word=str(rng.choice(WORDS)) if level == 3 else ""), rng


def render(scene: Scene, rng: np.random.Generator) -> bytes:
    """The scene as a PNG on a lightly tinted ground."""
    ground = tuple(int(c) for c in rng.integers(232, 256, 3))
    image = Image.new("RGB", (SIDE, SIDE), ground)
    pen = ImageDraw.Draw(image)
    for group in scene.groups:
        for x, y, size in _spots(group, rng):
            _PENS[group.shape](pen, x, y, size, COLOURS[group.colour])
    if scene.word:
        pen.text((SIDE // 2, SIDE // 2), scene.word, fill=(0, 0, 0), anchor="mm", font=ImageFont.load_default(20))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw_caption(seed: int, index: int, level: int) -> Sample:
    """A picture with its caption."""
    scene, rng = draw_scene(seed, index, level)
    meta = {"source": f"procedural-{level}", "level": level}
    return build_caption(f"p{level}-{index:07d}", render(scene, rng), "png", scene.caption, meta)


def draw_question(seed: int, index: int, level: int) -> Sample:
    """A picture with a question and its exact answer."""
    scene, rng = draw_scene(seed, index, level)
    image = render(scene, rng)
    question, answer = ask(scene, rng)
    meta = {"source": f"procedural-{level}", "level": level}
    turns = (Message(role="user", content=f"<image>\n{question}"), Message(role="assistant", content=answer))
    return build_dialogue(f"q{level}-{index:07d}", image, "png", turns, meta)


def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """One of the questions that fit a scene, with its answer."""
    group = scene.groups[int(rng.integers(len(scene.groups)))]
    pairs = [(f"What colour is the shape at the {group.place}?", group.colour)]
    pairs.append((f"Which shape is at the {group.place}?", group.shape))
    if group.count > 1 or len(scene.groups) > 1:
        pairs.append((f"How many shapes are at the {group.place}?", COUNTS[group.count]))
    if scene.word:
        pairs.append(("Which word is written?", scene.word))
    return pairs[int(rng.integers(len(pairs)))]


def _spots(group: Group, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Centres and half sizes of a group's shapes: two by two inside its quarter of the picture."""
    half, size = SIDE // 2, 20 if group.count == 1 else 10
    x0 = half if group.place.endswith("right") else 0
    y0 = half if group.place.startswith("bottom") else 0
    if group.count == 1:
        jitter = rng.integers(-4, 5, 2)
        return [(x0 + half // 2 + int(jitter[0]), y0 + half // 2 + int(jitter[1]), size)]
    cells = rng.permutation(4)[: group.count]
    return [(x0 + 14 + 28 * int(c % 2), y0 + 14 + 28 * int(c // 2), size) for c in cells]


def _circle(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _square(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)


def _triangle(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)


def _cross(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=fill)
    pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill=fill)


_Pen = Callable[[ImageDraw.ImageDraw, int, int, int, tuple[int, int, int]], None]
_PENS: dict[str, _Pen] = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}
