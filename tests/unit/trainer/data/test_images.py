"""Tests of image decoding, of tiling after InternVL2, and of synthetic samples."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from sailvl_trainer.data.images import open_image, read_size
from sailvl_trainer.data.synthetic import draw_caption, draw_question
from sailvl_trainer.data.tiles import choose_grid, count_tiles, cut_tiles
from tests.support.builders.images import build_exif, encode_image

GRIDS = [
    pytest.param(448, 448, 12, (1, 1), id="one tile"),
    pytest.param(896, 448, 12, (2, 1), id="wide"),
    pytest.param(448, 1344, 12, (1, 3), id="tall"),
    pytest.param(100, 100, 12, (1, 1), id="small image: a tie keeps one tile"),
    pytest.param(1344, 1344, 12, (3, 3), id="large image: a tie takes the larger grid"),
    pytest.param(2000, 500, 4, (4, 1), id="limited by max tiles"),
    pytest.param(5000, 400, 6, (6, 1), id="wider than every grid"),
]


@pytest.mark.parametrize(("width", "height", "most", "grid"), GRIDS)
def test_choose_grid_takes_the_closest_aspect_ratio(width: int, height: int, most: int, grid: tuple[int, int]) -> None:
    assert choose_grid(width, height, most, 448) == grid


def test_cut_tiles_normalises_tiles_and_thumbnail() -> None:
    pixels_N3HW = cut_tiles(Image.new("RGB", (300, 150), (255, 255, 255)), (2, 1), 112)
    assert pixels_N3HW.shape == (count_tiles((2, 1)), 3, 112, 112) == (3, 3, 112, 112)
    assert pixels_N3HW[:, 0].mean() == pytest.approx((1 - 0.485) / 0.229, rel=1e-4)


def build_rotated() -> bytes:
    return encode_image(Image.new("RGB", (20, 10), (255, 0, 0)), "JPEG", exif=build_exif(6))


BLUE = Image.new("RGB", (20, 10), (0, 0, 255))
DEEP = Image.fromarray(np.full((10, 20), 65535, dtype=np.uint16))
IMAGES = [
    pytest.param(encode_image(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG"), (20, 10), (255, 0, 0), id="CMYK"),
    pytest.param(encode_image(DEEP, "PNG"), (20, 10), (255, 255, 255), id="16 bits"),
    pytest.param(
        encode_image(Image.new("RGBA", (20, 10), (0, 0, 0, 0)), "PNG"), (20, 10), (255, 255, 255), id="transparent"
    ),
    pytest.param(encode_image(Image.new("P", (20, 10)), "PNG"), (20, 10), (0, 0, 0), id="palette"),
    pytest.param(
        encode_image(
            Image.new("RGB", (20, 10), (0, 0, 255)), "GIF", save_all=True, append_images=[Image.new("RGB", (20, 10))]
        ),
        (20, 10),
        (0, 0, 255),
        id="animated: the first frame",
    ),
    pytest.param(build_rotated(), (10, 20), (255, 0, 0), id="rotated by EXIF"),
]


@pytest.mark.parametrize(("data", "size", "colour"), IMAGES)
def test_open_image_returns_upright_rgb(data: bytes, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    with open_image(data) as image:
        assert (image.mode, image.size, read_size(data)) == ("RGB", size, size)
        assert np.abs(np.asarray(image)[5, 5].astype(int) - colour).max() <= 3


def test_synthetic_sample_depends_on_seed_index_and_level_only() -> None:
    digest = hashlib.sha256()
    for level in (1, 2, 3):
        for sample in (draw_caption(0, 7, level), draw_question(0, 7, level)):
            digest.update(repr(sample.messages).encode() + (sample.image or b""))
    again = hashlib.sha256()
    for level in (1, 2, 3):
        for sample in (draw_caption(0, 7, level), draw_question(0, 7, level)):
            again.update(repr(sample.messages).encode() + (sample.image or b""))
    assert digest.digest() == again.digest()
    assert draw_caption(0, 7, 1).image != draw_caption(0, 8, 1).image
