"""Program that measures the peak memory of decoding images, each in a process whose heap holds nothing else.

Arguments: paths of encoded images. Prints a line for each: the estimate and the measured peak in bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from pathlib import Path

from sailvl_trainer.curate.dedup import hash_perceptually, hash_pixels
from sailvl_trainer.data.image_headers import read_header
from sailvl_trainer.data.images import open_image


def read_status(name: str) -> int:
    """Return a size from the status of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def measure(data: bytes) -> int:
    """Return the peak of the memory that verification of the image takes."""
    ctypes.CDLL(None).malloc_trim(0)  # or decoding would reuse what earlier images have left in the heap
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = read_status("VmRSS")
    with open_image(data) as image:
        hash_pixels(image)
        hash_perceptually(image)
    return read_status("VmHWM") - before


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
