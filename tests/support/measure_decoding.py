"""Program that measures the peak memory of decoding images, each in a process whose heap holds nothing else.

Arguments: paths of encoded images. Prints a line for each: the estimate and the measured peak in bytes.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from sailvl_trainer.curate.dedup import hash_perceptually, hash_pixels
from sailvl_trainer.data.image_headers import read_header
from sailvl_trainer.data.images import open_image
from tests.support.memory import measure_peak


def measure(data: bytes) -> int:
    """Return the peak of the memory that verification of the image takes."""
    with measure_peak() as measured, open_image(data) as image:
        hash_pixels(image)
        hash_perceptually(image)
    return measured.peak_bytes


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for path in sys.argv[1:]:
        data = Path(path).read_bytes()
        estimate = read_header(data).peak_bytes
        sys.stdout.flush()
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        sys.stdout.write(f"{estimate} {measure(data)}\n")
        sys.stdout.flush()
        os._exit(0)
