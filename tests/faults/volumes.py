"""Storage of one run: a folder of the machine's own file system, or a disk of its own that can fill up or be gone.

The nodes share the machine's file system, so a volume is a folder that all workers mount.
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
"""Samples of the two trainings."""
POSTERS, COPIES, POSTER_SIZE = 40, 16, (1600, 1200)
"""Large pictures, most of them duplicates: work for curation of which little is kept."""
BENCHMARKS = {"first": 640, "second": 160}
"""Questions of each."""
DISK_BYTES = 1 << 30
SHUTDOWN = (2 << 30) | (4 << 16) | (ord("X") << 8) | 125
"""EXT4_IOC_SHUTDOWN of <linux/ext4.h>; argument 0: what was written is on the disk first."""


def prepare_data() -> Path:
    """What every run reads: made once, with the demo's language model."""
    whole = FOLDER / ".data-is-whole"
    if whole.exists():
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
    whole.touch()
    return DATA


def draw_posters(folder: Path) -> None:
    """POSTERS pictures, each under COPIES names."""
    folder.mkdir(parents=True)
    for number in range(POSTERS):
        first = folder / f"poster-{number:03d}-00.png"
        draw_poster(number).save(first)
        first.with_suffix(".txt").write_text(f"poster number {number} of coloured discs")
        for copy in range(1, COPIES):
            for suffix in (".png", ".txt"):
                os.link(first.with_suffix(suffix), folder / f"poster-{number:03d}-{copy:02d}{suffix}")


def draw_poster(number: int) -> Image.Image:
    """Discs at random."""
    chance, (width, height) = random.Random(number), POSTER_SIZE
    picture = Image.new("RGB", POSTER_SIZE, draw_color(chance))
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, radius = chance.randrange(width), chance.randrange(height), chance.randrange(60, 400)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=draw_color(chance))
    return picture


def draw_color(chance: random.Random) -> tuple[int, int, int]:
    return chance.randrange(256), chance.randrange(256), chance.randrange(256)


class Volume:
    """A folder."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = FOLDER / "storage" / name

    def make(self) -> None:
        """With the data; the raw pictures as links."""
        self.remove()
        self._fill_in("-al")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _fill_in(self, how: str) -> None:
        self.folder.mkdir(parents=True)
        os.chown(self.folder, WORKER_USER, WORKER_USER)
        for path in sorted(DATA.iterdir()):
            flags = how if path.name == "raw" else "-a"  # a run may have its own sets spoilt, not those of all
            subprocess.run(["cp", flags, path, self.folder / path.name], check=True)


class Disk(Volume):
    """A file system of its own in a file, mounted where the nodes look for it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._mount = FOLDER / "storage" / f"{name}.mount"
        self._image = FOLDER / "storage" / f"{name}.ext4"
        self._filler = self._mount / "filler"
        self.folder = self._mount / "data"
        """Below the mount, so that it isn't there without it."""
        self._device = ""

    def make(self) -> None:
        self.remove()
        self._mount.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(DISK_BYTES)
        call("mkfs.ext4", "-q", "-m", "0", str(self._image))
        self._device = call("losetup", "--find", "--show", str(self._image)).strip()
        call("mount", self._device, str(self._mount))
        self._fill_in("-a")

    def remove(self) -> None:
        if os.path.ismount(self._mount):
            call("umount", str(self._mount))
        for device in call("losetup", "--noheadings", "--output", "NAME", "--associated", str(self._image)).split():
            call("losetup", "--detach", device)
        self._image.unlink(missing_ok=True)
        shutil.rmtree(self._mount, ignore_errors=True)

    def fill_up(self) -> None:
        """To the last byte, as somebody else's file would."""
        with self._filler.open("wb", buffering=0) as file:
            for block in (1 << 24, 1 << 16, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(block))
                except OSError:
                    continue

    def make_room(self) -> None:
        self._filler.unlink()

    def take_away(self) -> None:
        """As if its server had gone: whoever has it open gets errors, whoever looks for it finds nothing."""
        handle = os.open(self._mount, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", 0))
        finally:
            os.close(handle)
        call("umount", str(self._mount))

    def bring_back(self, seconds: float = 60) -> None:
        """Once nobody holds on to what is broken: until then the machine would mount the same again."""
        until = time.monotonic() + seconds
        while holders := find_holders(self._device):
            assert time.monotonic() < until, f"{self._device} is still in use by {holders}"
            time.sleep(0.2)
        call("mount", self._device, str(self._mount))


def find_holders(device: str) -> list[int]:
    """Processes in whose file system a device is mounted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            if f" {device} " in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def build_volume(volume: Volume, namespace: str) -> dict[str, Any]:
    """A PersistentVolume on the folder, which has to be there, and the claim `storage-NAME` on it."""
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
        "metadata": {"name": claim_name(volume), "namespace": namespace},
        "spec": {"accessModes": modes, "resources": {"requests": size}, "storageClassName": "", "volumeName": name},
    }
    return {"apiVersion": "v1", "kind": "List", "items": [persistent, claim]}


def claim_name(volume: Volume) -> str:
    return f"storage-{volume.name}"


def call(*command: str) -> str:
    """Its output. Raises with its words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
