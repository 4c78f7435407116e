"""Synthetic images of coloured shapes, with captions and with questions whose answers are exact.

Every sample is a pure function of (seed, index, level), so a data set needs no files and is the same on every machine.
Level 1: one shape. Level 2: several shapes in one corner. Level 3: two kinds of shapes and a written word.
Used by curation (sources of format `procedural`), by the demo and by tests.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sailvl_trainer.data.samples import Message, Sample, build_caption_sample, build_dialogue_sample

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
CORNERS = ("top left", "top right", "bottom left", "bottom right")
VOCABULARY = ("cat", "dog", "sun", "map", "key", "tea", "box", "red", "top", "ice")
"""An image of level 3 shows one of these as text."""
SIDE = 112
"""Side of a square image in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeGroup:
    """Shapes of one kind and colour in one corner of the image."""

    shape: str
    colour: str
    count: int
    corner: str

    @property
    def phrase(self) -> str:
        """The group as a noun phrase: "two red circles"."""
        plural = "" if self.count == 1 else "es" if self.shape.endswith("s") else "s"
        return f"{COUNTS[self.count]} {self.colour} {self.shape}{plural}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Everything that an image shows."""

    groups: tuple[ShapeGroup, ...]
    word: str = ""
    """Word written in the middle; empty below level 3."""

    @property
    def caption(self) -> str:
        """One sentence that describes the whole image."""
        description = " and ".join(f"{g.phrase} at the {g.corner}" for g in self.groups)
        return f"{description} and the word {self.word}." if self.word else f"{description}."


def draw_scene(seed: int, index: int, level: int) -> tuple[Scene, np.random.Generator]:
    """Draw the scene of sample `index`; also return the generator, from which rendering and questions are drawn next.

    Raises ValueError for an unknown level.
    """
    if level not in (1, 2, 3):
        raise ValueError(f"level is {level}; use 1, 2 or 3")
    rng = np.random.default_rng((seed, level, index))
    corners = rng.permutation(CORNERS)
    groups = tuple(
        ShapeGroup(
            shape=str(rng.choice(SHAPES)),
            colour=str(rng.choice(tuple(COLOURS))),
            count=1 if level == 1 else int(rng.integers(1, 5)),
            corner=str(corners[i]),
        )
        for i in range(2 if level == 3 else 1)
    )
    return Scene(groups=groups, word=str(rng.choice(VOCABULARY)) if level == 3 else ""), rng


def render_scene(scene: Scene, rng: np.random.Generator) -> bytes:
    """Render the scene as a PNG of SIDE x SIDE pixels on a lightly tinted background."""
    background = tuple(int(c) for c in rng.integers(232, 256, 3))
    image = Image.new("RGB", (SIDE, SIDE), background)
    canvas = ImageDraw.Draw(image)
    for group in scene.groups:
        for x, y, radius in _place_shapes(group, rng):
            _DRAW_SHAPE[group.shape](canvas, x, y, radius, COLOURS[group.colour])
    if scene.word:
        canvas.text((SIDE // 2, SIDE // 2), scene.word, fill=(0, 0, 0), anchor="mm", font=ImageFont.load_default(20))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw_caption(seed: int, index: int, level: int) -> Sample:
    """Draw a sample of an image and its caption."""
    scene, rng = draw_scene(seed, index, level)
    meta = {"source": f"procedural-{level}", "level": level}
    return build_caption_sample(f"p{level}-{index:07d}", render_scene(scene, rng), "png", scene.caption, meta)


def draw_question(seed: int, index: int, level: int) -> Sample:
    """Draw a sample of an image, a question and its exact answer."""
    scene, rng = draw_scene(seed, index, level)
    image = render_scene(scene, rng)
    question, answer = choose_question(scene, rng)
    meta = {"source": f"procedural-{level}", "level": level}
    messages = (Message(role="user", content=f"<image>\n{question}"), Message(role="assistant", content=answer))
    return build_dialogue_sample(f"q{level}-{index:07d}", image, "png", messages, meta)


def choose_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Choose one of the questions that fit the scene; return it with its answer."""
    group = scene.groups[int(rng.integers(len(scene.groups)))]
    pairs = [(f"What colour is the shape at the {group.corner}?", group.colour)]
    pairs.append((f"Which shape is at the {group.corner}?", group.shape))
    if group.count > 1 or len(scene.groups) > 1:
        pairs.append((f"How many shapes are at the {group.corner}?", COUNTS[group.count]))
    if scene.word:
        pairs.append(("Which word is written?", scene.word))
    return pairs[int(rng.integers(len(pairs)))]


def _place_shapes(group: ShapeGroup, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Return centre (x, y) and radius in pixels of each shape, on a grid of two by two in the group's quarter."""
    half, radius = SIDE // 2, 20 if group.count == 1 else 10
    x0 = half if group.corner.endswith("right") else 0
    y0 = half if group.corner.startswith("bottom") else 0
    if group.count == 1:
        jitter = rng.integers(-4, 5, 2)
        return [(x0 + half // 2 + int(jitter[0]), y0 + half // 2 + int(jitter[1]), radius)]
    cells = rng.permutation(4)[: group.count]
    return [(x0 + 14 + 28 * int(c % 2), y0 + 14 + 28 * int(c // 2), radius) for c in cells]


def _draw_circle(canvas: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _draw_square(canvas: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    canvas.rectangle((x - r, y - r, x + r, y + r), fill=fill)


def _draw_triangle(canvas: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)


def _draw_cross(canvas: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    canvas.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=fill)
    canvas.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill=fill)


_DrawShape = Callable[[ImageDraw.ImageDraw, int, int, int, tuple[int, int, int]], None]
_DRAW_SHAPE: dict[str, _DrawShape] = {
    "circle": _draw_circle,
    "square": _draw_square,
    "triangle": _draw_triangle,
    "cross": _draw_cross,
}
