"""The storage of one run: a folder on the host, or a disk of its own that can fill up or disappear.

The nodes share the host's file system, so a volume is a folder that all workers mount.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sailvl_trainer.demo.build_data import make_benchmark, make_questions, make_shapes
from tests.support.live.cluster import ROOT

FOLDER = ROOT / "build/faults"
DATA = FOLDER / "data"
WORKER_USER = 65532
SHAPES, QUESTIONS = 600, 600
"""Number of samples of both training stages."""
POSTERS, COPIES, POSTER_SIZE = 40, 16, (1600, 1200)
"""Large images, most of them duplicates: much work for curation, of which few images are selected."""
BENCHMARKS = {"first": 640, "second": 160}
"""Number of questions by benchmark."""
DISK_BYTES = 1 << 30
SHUTDOWN = (2 << 30) | (4 << 16) | (ord("X") << 8) | 125
"""EXT4_IOC_SHUTDOWN of <linux/ext4.h>; with argument 0 written data is flushed first."""


def prepare_data() -> Path:
    """Build the data of all runs once, with the demo's language model, and return its folder."""
    marker = FOLDER / ".data-is-complete"
    if marker.exists():
        return DATA
    subprocess.run([ROOT / "hack/demo_data.sh", ROOT / ".venv/bin/python", ROOT / "build/demo"], cwd=ROOT, check=True)
    shutil.rmtree(DATA, ignore_errors=True)
    shutil.copytree(ROOT / "build/demo/models", DATA / "models")
    make_shapes(DATA / "raw/shapes", SHAPES)
    draw_posters(DATA / "raw/posters")
    make_questions(DATA / "sft", 1, QUESTIONS)
    for name, number in BENCHMARKS.items():
        make_benchmark(DATA / f"benchmarks/{name}.tsv", 1, number)
    for path in (DATA, *DATA.rglob("*")):
        os.chown(path, WORKER_USER, WORKER_USER)
    marker.touch()
    return DATA


def draw_posters(folder: Path) -> None:
    """Write POSTERS images, each under COPIES names."""
    folder.mkdir(parents=True)
    for number in range(POSTERS):
        first = folder / f"poster-{number:03d}-00.png"
        draw_poster(number).save(first)
        first.with_suffix(".txt").write_text(f"poster number {number} of coloured discs")
        for copy in range(1, COPIES):
            for suffix in (".png", ".txt"):
                os.link(first.with_suffix(suffix), folder / f"poster-{number:03d}-{copy:02d}{suffix}")


def draw_poster(number: int) -> Image.Image:
    """Draw random discs."""
    rng, (width, height) = random.Random(number), POSTER_SIZE
    image = Image.new("RGB", POSTER_SIZE, draw_color(rng))
    canvas = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, radius = rng.randrange(width), rng.randrange(height), rng.randrange(60, 400)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=draw_color(rng))
    return image


def draw_color(rng: random.Random) -> tuple[int, int, int]:
    """Return a random RGB color."""
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


class FolderVolume:
    """A folder on the host."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = FOLDER / "storage" / name

    def create(self) -> None:
        """Copy the data into a new folder; raw images are hard links."""
        self.remove()
        self._copy_data("-al")

    def remove(self) -> None:
        """Delete the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _copy_data(self, raw_flags: str) -> None:
        self.folder.mkdir(parents=True)
        os.chown(self.folder, WORKER_USER, WORKER_USER)
        for path in sorted(DATA.iterdir()):
            flags = raw_flags if path.name == "raw" else "-a"  # tests corrupt the copies
            subprocess.run(["cp", flags, path, self.folder / path.name], check=True)


class DiskVolume(FolderVolume):
    """A file system of its own in a file, mounted on the host."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._mount = FOLDER / "storage" / f"{name}.mount"
        self._image = FOLDER / "storage" / f"{name}.ext4"
        self._filler = self._mount / "filler"
        self.folder = self._mount / "data"
        """Below the mount point, so that it does not exist while the disk is not mounted."""
        self._device = ""

    def create(self) -> None:
        """Create and mount the file system and copy the data into it."""
        self.remove()
        self._mount.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(DISK_BYTES)
        run_command("mkfs.ext4", "-q", "-m", "0", str(self._image))
        self._device = run_command("losetup", "--find", "--show", str(self._image)).strip()
        run_command("mount", self._device, str(self._mount))
        self._copy_data("-a")

    def remove(self) -> None:
        """Unmount and delete the file system."""
        if os.path.ismount(self._mount):
            run_command("umount", str(self._mount))
        for device in run_command(
            "losetup", "--noheadings", "--output", "NAME", "--associated", str(self._image)
        ).split():
            run_command("losetup", "--detach", device)
        self._image.unlink(missing_ok=True)
        shutil.rmtree(self._mount, ignore_errors=True)

    def fill_up(self) -> None:
        """Fill the disk to the last byte with a file outside the run's folder."""
        with self._filler.open("wb", buffering=0) as file:
            for block in (1 << 24, 1 << 16, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(block))
                except OSError:
                    continue

    def free_space(self) -> None:
        """Delete the file that fills the disk."""
        self._filler.unlink()

    def shut_down(self) -> None:
        """Take the disk away as if its server were gone: open files return errors, and the folder does not exist."""
        handle = os.open(self._mount, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", 0))
        finally:
            os.close(handle)
        run_command("umount", str(self._mount))

    def mount_again(self, seconds: float = 60) -> None:
        """Mount the disk once no process uses the broken mount, which would be mounted again otherwise."""
        until = time.monotonic() + seconds
        while holders := find_holders(self._device):
            assert time.monotonic() < until, f"{self._device} is still in use by {holders}"
            time.sleep(0.2)
        run_command("mount", self._device, str(self._mount))


def find_holders(device: str) -> list[int]:
    """Return the PIDs of processes in whose mount namespace a device is mounted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            if f" {device} " in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def build_volume_objects(volume: FolderVolume, namespace: str) -> dict[str, Any]:
    """Return a PersistentVolume on the volume's folder, which must exist, and a claim on it."""
    modes, size, name = ["ReadWriteMany"], {"storage": "10Gi"}, f"{namespace}-{volume.name}"
    host_path = {"path": str(volume.folder), "type": "Directory"}
    persistent = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "labels": {"sailvl-test": namespace}},
        "spec": {"capacity": size, "accessModes": modes, "hostPath": host_path, "storageClassName": ""},
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": get_claim_name(volume), "namespace": namespace},
        "spec": {"accessModes": modes, "resources": {"requests": size}, "storageClassName": "", "volumeName": name},
    }
    return {"apiVersion": "v1", "kind": "List", "items": [persistent, claim]}


def get_claim_name(volume: FolderVolume) -> str:
    """Return the name of a volume's claim."""
    return f"storage-{volume.name}"


def run_command(*command: str) -> str:
    """Run a command that must succeed and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
