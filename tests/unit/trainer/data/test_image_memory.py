"""Tests of the memory that images take: the estimate from the header, and the budget that threads share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sailvl_trainer.data.image_headers import read_header
from sailvl_trainer.data.image_memory import (
    DEFAULT_BYTES,
    FILE_MEMORY,
    IMAGE_MEMORY,
    MemoryBudget,
    limit_image_memory,
)
from sailvl_trainer.data.image_peak_memory import WORKING_BYTES
from sailvl_trainer.data.images import open_image
from tests.support.builders.images import build_exif, encode_image

SIDE = 2400
ROOT = Path(__file__).parents[4]


def build_images() -> dict[str, bytes]:
    """Encode one image in each format and mode whose decoder takes memory of its own."""
    grey = Image.linear_gradient("L").resize((SIDE, SIDE))
    rgb, values_HW = Image.merge("RGB", (grey, grey, grey)), np.asarray(grey)
    deep, floats = Image.fromarray(values_HW.astype(np.uint16) * 257), Image.fromarray(values_HW.astype(np.float32))
    return {
        "JPEG": encode_image(rgb, "JPEG"),
        "progressive JPEG": encode_image(rgb, "JPEG", progressive=True, subsampling=0),
        "CMYK JPEG": encode_image(rgb.convert("CMYK"), "JPEG"),
        "rotated JPEG": encode_image(rgb, "JPEG", exif=build_exif(6)),
        "PNG": encode_image(rgb, "PNG", compress_level=1),
        "transparent PNG": encode_image(rgb.convert("RGBA"), "PNG", compress_level=1),
        "grey PNG": encode_image(grey, "PNG", compress_level=1),
        "PNG with 16 bits": encode_image(deep, "PNG", compress_level=1),
        "WebP": encode_image(rgb, "WEBP", method=0),
        "GIF": encode_image(grey, "GIF"),
        "BMP": encode_image(rgb, "BMP"),
        "TIFF in strips": encode_image(rgb, "TIFF", compression="tiff_lzw"),
        "TIFF in one strip": encode_image(rgb, "TIFF", compression="tiff_lzw", strip_size=1 << 30),
        "TIFF of floats": encode_image(floats, "TIFF"),
        "rotated TIFF": encode_image(rgb, "TIFF", exif=build_exif(6)),
        "rotated TIFF in strips": encode_image(rgb, "TIFF", compression="tiff_lzw", exif=build_exif(8)),
    }


@pytest.fixture(autouse=True)
def restore_budgets() -> Iterator[None]:
    """Restore the size of the process's budgets after every test."""
    yield
    limit_image_memory(None)


@pytest.mark.slow
def test_estimate_covers_the_measured_peak_of_every_format(tmp_path: Path) -> None:
    images = build_images()
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-m", "tests.support.measure_decoding", *(str(tmp_path / name) for name in images)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'trainer'}"}
    output = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    sizes = [tuple(map(int, line.split())) for line in output.splitlines()]
    per_pixel = {
        name: (round(estimate / SIDE**2, 1), round(peak / SIDE**2, 1))
        for name, (estimate, peak) in zip(images, sizes, strict=True)
    }
    assert {name: sizes for name, sizes in per_pixel.items() if not sizes[1] <= sizes[0] <= 4 * sizes[1]} == {}


def test_rotated_tiff_is_estimated_with_its_pixels_twice() -> None:
    for orientation, per_pixel in ((1, 5), (3, 8), (6, 8)):
        data = encode_image(Image.new("RGB", (1000, 1000)), "TIFF", exif=build_exif(orientation))
        assert (read_header(data).peak_bytes - WORKING_BYTES) // 10**6 == per_pixel


def test_image_that_exceeds_the_whole_budget_is_decoded_alone() -> None:
    data = encode_image(Image.new("RGB", (1000, 1000)), "PNG")
    for megabytes in (40, 100):
        limit_image_memory(megabytes << 20)
        with open_image(data) as image:
            assert image.size == (1000, 1000)
            assert 5_000_000 < IMAGE_MEMORY.reserved_bytes <= IMAGE_MEMORY.total_bytes
    assert IMAGE_MEMORY.reserved_bytes == 0


def test_reservation_ends_with_an_error_of_the_block() -> None:
    def fail() -> None:
        with open_image(encode_image(Image.new("RGB", (10, 10)), "PNG")):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert IMAGE_MEMORY.reserved_bytes == 0


def test_threads_never_reserve_more_than_the_budget() -> None:
    budget, peaks = MemoryBudget(100), []

    def work(number: int) -> None:
        with budget.reserve(number % 61):
            peaks.append(budget.reserved_bytes)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(2000)))
    assert max(peaks) <= 100
    assert len(peaks) == 2000
    assert budget.reserved_bytes == 0


def test_large_reservation_is_not_overtaken_by_small_ones() -> None:
    budget, order = MemoryBudget(100), []
    started = [threading.Event() for _ in range(3)]

    def work(number: int, size: int) -> None:
        started[number].set()
        with budget.reserve(size):
            order.append(number)

    with ThreadPoolExecutor(3) as threads, budget.reserve(50):
        for number, size in enumerate((100, 10, 10)):
            threads.submit(work, number, size)
            assert started[number].wait(10)
            while len(budget._waiting) <= number:
                pass
        assert order == []
    assert order[0] == 0


def test_reservation_above_the_budget_takes_all_of_it() -> None:
    budget = MemoryBudget(100)
    with ThreadPoolExecutor(1) as threads:
        with budget.reserve(60):
            large = budget.reserve(101)
            waiting = threads.submit(large.__enter__)
            while not budget._waiting:
                assert not waiting.done()
            assert budget.reserved_bytes == 60
        waiting.result(10)
        assert budget.reserved_bytes == 100
        large.__exit__(None, None, None)
    assert budget.reserved_bytes == 0


def test_waiting_reservation_is_served_when_the_budget_shrinks_below_it() -> None:
    budget = MemoryBudget(100)
    with ThreadPoolExecutor(1) as threads:
        with budget.reserve(60):
            large = budget.reserve(80)
            waiting = threads.submit(large.__enter__)
            while not budget._waiting:
                assert not waiting.done()
            budget.resize(70)
        waiting.result(10)
        assert budget.reserved_bytes == 70
        large.__exit__(None, None, None)
    assert budget.reserved_bytes == 0


def test_budgets_are_half_of_the_memory_of_the_rank() -> None:
    limit_image_memory(8 << 30)
    assert (FILE_MEMORY.total_bytes, IMAGE_MEMORY.total_bytes) == (1 << 30, 3 << 30)
    limit_image_memory(None)
    assert FILE_MEMORY.total_bytes + IMAGE_MEMORY.total_bytes == DEFAULT_BYTES
