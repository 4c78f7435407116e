"""Tests of curation with mutated images, tars and caption files: each record is read, or counted with its reason."""

from __future__ import annotations

import io
import json
import random
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sailvl_trainer.contract import CurateConfig, SourceConfig
from sailvl_trainer.curate.artifacts import write_items, write_verified_items
from sailvl_trainer.curate.items import Item
from sailvl_trainer.curate.report import OUTCOME_LABELS
from sailvl_trainer.curate.sources import list_items, list_partitions, resolve_roots
from sailvl_trainer.curate.verify import verify_item
from sailvl_trainer.data import images
from sailvl_trainer.data.image_memory import FILE_MEMORY, IMAGE_MEMORY
from tests.support.builders.images import build_exif, draw_noise, encode_image
from tests.support.fuzz import draw_generators, mutate_bytes
from tests.support.memory import measure_peak

MAX_SECONDS = 20
"""Time for one source: an image whose header is mutated can be as large as the limit of pixels."""
MAX_PIXELS = 4 << 20
MAX_IMAGE_BYTES = 128 << 20
"""Memory for decoding one image, above which it is refused."""
MAX_BYTES = MAX_IMAGE_BYTES + (128 << 20)
"""Memory for listing and verifying one source: one image, and buffers of the libraries."""
NOISE = draw_noise()
GREY = Image.fromarray((np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60))
FRAMES = {"save_all": True, "append_images": [draw_noise(seed=1)]}
IMAGES = [
    encode_image(NOISE, "JPEG", exif=build_exif(6)),
    encode_image(NOISE, "JPEG", progressive=True),
    encode_image(NOISE.convert("CMYK"), "JPEG"),
    encode_image(NOISE, "MPO", **FRAMES),
    encode_image(NOISE, "PNG", exif=build_exif(3)),
    encode_image(GREY, "PNG"),
    encode_image(NOISE.quantize(8), "PNG", transparency=1),
    encode_image(NOISE, "WEBP", exif=build_exif(2)),
    encode_image(NOISE, "WEBP", **FRAMES),
    encode_image(NOISE, "GIF", **FRAMES),
    encode_image(NOISE, "BMP"),
    encode_image(NOISE, "TIFF", exif=build_exif(8)),
    encode_image(NOISE, "TIFF", compression="tiff_lzw"),
    encode_image(NOISE, "TIFF", compression="jpeg"),
    encode_image(GREY, "TIFF", compression="tiff_adobe_deflate"),
]
RECORDS = b"".join(
    json.dumps(record).encode() + b"\n"
    for record in (
        {"image": "a.png", "caption": "a red circle"},
        {"file_name": "b.png", "text": "é" * 50, "size": [1.5e10, {"deep": [None, True]}]},
        {"image": "gone.png", "caption": "\ud800"},
    )
)


@pytest.fixture(autouse=True)
def ignore_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings about unusual metadata, as the stage does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build_tar(generator: random.Random) -> bytes:
    """Build a tar in one of the formats, with long names and captions."""
    buffer = io.BytesIO()
    form = generator.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(3):
            stem = f"folder/{'é' * generator.choice((1, 40))}{number}"
            files = {"png": generator.choice(IMAGES)[:900], "txt": b"a caption", "json": b'{"caption": "other"}'}
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{stem}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def curate(root: Path, form: str) -> list[str]:
    """List and verify a source, and write the files of both steps, as the stage does; return the outcomes."""
    sources = (SourceConfig(path=str(root), format=form),)  # type: ignore[arg-type]
    config, roots = CurateConfig(sources=sources, min_side=4, max_pixels=MAX_PIXELS), resolve_roots(sources, str(root))
    started, outcomes = time.monotonic(), []
    for partition in list_partitions(sources, seed=0):
        items: list[Item] = list(list_items(partition, roots))
        write_items(root / ".items.parquet", items)
        verified = [verify_item(item, config, 28, roots) for item in items]
        write_verified_items(root / ".rows.parquet", 0, items, verified)
        outcomes += [result.outcome for result in verified]
        assert all(result.outcome == "ok" or result.detail for result in verified)
    assert time.monotonic() - started < MAX_SECONDS
    return outcomes


def write_image(root: Path, generator: random.Random) -> str:
    (root / "a.png").write_bytes(mutate_bytes(generator.choice(IMAGES), generator))
    (root / "a.txt").write_bytes(mutate_bytes("a caption, ein Wört".encode(), generator))
    return "imagefolder"


def write_tar(root: Path, generator: random.Random) -> str:
    (root / "a.tar").write_bytes(mutate_bytes(build_tar(generator), generator))
    return "webdataset"


def write_tar_with_valid_checksums(root: Path, generator: random.Random) -> str:
    """Mutate fields of the headers and correct the checksums, so that the reader doesn't stop there."""
    data = bytearray(build_tar(generator))
    for start in range(0, len(data) - 512, 512):
        if data[start + 257 : start + 262] == b"ustar" and generator.random() < 0.5:
            field = generator.choice(((0, 100), (124, 136), (156, 157), (345, 500)))
            size = field[1] - field[0]
            choices = (
                generator.randbytes(size),
                b"\xff" * size,
                b"\x80" + bytes(size - 1),
                b"7" * size,
                b"LKxgS"[:size],
            )
            data[start + field[0] : start + field[0] + size] = generator.choice(choices).ljust(size, b"\0")
            header = data[start : start + 512]
            header[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    (root / "a.tar").write_bytes(data)
    return "webdataset"


def write_records(root: Path, generator: random.Random) -> str:
    for name in ("a.png", "b.png"):
        (root / name).write_bytes(IMAGES[4])
    (root / "captions.jsonl").write_bytes(mutate_bytes(RECORDS * generator.randint(1, 3), generator))
    return "imagefolder"


SOURCES = [
    pytest.param(write_image, id="image"),
    pytest.param(write_tar, id="tar"),
    pytest.param(write_tar_with_valid_checksums, id="tar with valid checksums"),
    pytest.param(write_records, id="caption file"),
]


@pytest.mark.fuzz
@pytest.mark.parametrize("write", SOURCES)
def test_mutated_source_is_read_or_counted(
    write: Callable[[Path, random.Random], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", MAX_IMAGE_BYTES)
    outcomes: set[str] = set()
    for generator in draw_generators(15):
        try:
            form = write(tmp_path, generator)
            with measure_peak() as measured:
                outcomes.update(curate(tmp_path, form))
            assert measured.peak_bytes < MAX_BYTES
        except BaseException as error:
            error.add_note(f"repeat with SAILVL_FUZZ_SEED={generator.number}")  # type: ignore[attr-defined]
            raise
    assert outcomes <= {*OUTCOME_LABELS, "ok"}
    assert len(outcomes) > 1
    assert (FILE_MEMORY.reserved_bytes, IMAGE_MEMORY.reserved_bytes) == (0, 0)
