"""Tests of reading tars from untrusted sources, with headers that tarfile follows without end or without limit."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sailvl_trainer.curate.items import Item
from sailvl_trainer.curate.sources import list_tar
from sailvl_trainer.curate.tar_members import BLOCK_BYTES, TarMember, iter_tar_members
from sailvl_trainer.storage.data_files import DataRoots

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = ("a.jpg", "./b/c.jpg", "d" * 90 + "/" + "e" * 60 + ".png", "é/ü.png", "folder/", "link", "hard", "z.txt")


def build_member(name: str, size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def build_header(name: str = "b.jpg", *, kind: bytes = b"0", size: int | bytes = 0, sparse_map: bool = False) -> bytes:
    """Build one header; `size` is a number, also a negative one, or the raw field.

    `sparse_map`: whether blocks follow that continue the map of a sparse file.
    """
    header = bytearray(build_member(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size if isinstance(size, bytes) else encode_number(size)
    header[156:157] = kind
    header[482] = sparse_map
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def encode_number(number: int) -> bytes:
    """Encode a number as GNU tar does if it has no octal form: big-endian, with the highest bit set."""
    data = bytearray(number.to_bytes(12, "big", signed=True))
    data[0] |= 0x80
    return bytes(data)


def build_extension(kind: bytes, data: bytes) -> bytes:
    return build_header("././@x", kind=kind, size=len(data)) + data + bytes(-len(data) % BLOCK_BYTES)


def build_pax(*records: bytes) -> bytes:
    return build_extension(b"x", b"".join(records))


FIRST = build_header("a.jpg", size=5) + b"image".ljust(BLOCK_BYTES, b"\0")
END = bytes(2 * BLOCK_BYTES)
SPARSE_MAP = (bytes(504) + b"\1").ljust(BLOCK_BYTES, b"\0") + bytes(BLOCK_BYTES)
"""Two blocks that continue the map of a sparse file; the first announces the second."""
INVALID_TARS = [
    pytest.param(build_header(size=-512), id="negative size, back to its own header"),
    pytest.param(build_header(size=-(1 << 80)), id="negative size beyond the file's begin"),
    pytest.param(build_header(size=1 << 62), id="size beyond the file"),
    pytest.param(build_header(size=b"7777777777\0\0"), id="octal size beyond the file"),
    pytest.param(build_header(size=b"12x\0" + bytes(8)), id="size that is no number"),
    pytest.param(build_pax(b"13 size=-512\n") + build_header(), id="negative size in a pax record"),
    pytest.param(build_pax(b"29 size=99999999999999999999\n") + build_header(), id="large size in a pax record"),
    pytest.param(build_pax(b"99999 size=1\n") + build_header(), id="pax record longer than its header"),
    pytest.param(build_pax(b"0 size=1\n") + build_header(), id="pax record of length zero"),
    pytest.param(build_pax(b"1" * 5000 + b" size=1\n") + build_header(), id="pax record with 5,000 digits"),
    pytest.param(build_pax(b"no record at all") + build_header(), id="pax header without a record"),
    pytest.param(build_header(kind=b"x", size=1 << 40) + bytes(4096), id="huge pax header"),
    pytest.param(build_extension(b"x", bytes(2 << 20)) + build_header(), id="pax header above the limit"),
    pytest.param(build_header(kind=b"L", size=1 << 40) + bytes(4096), id="huge long name"),
    pytest.param(build_header(kind=b"S", size=1 << 62), id="sparse file beyond the file"),
    pytest.param(END + build_header("b.jpg"), id="second tar behind the first"),
    pytest.param(bytes(5 << 20), id="more padding than a tar has"),
]


@pytest.fixture
def list_bytes(tmp_path: Path) -> Callable[[bytes], list[Item]]:
    """Return a function that lists the items of a tar with the given bytes."""

    def write_and_list(data: bytes) -> list[Item]:
        path = tmp_path / "t.tar"
        path.write_bytes(data)
        return list(list_tar(path, "s", DataRoots.resolve(tmp_path)))

    return write_and_list


@pytest.mark.parametrize("broken", INVALID_TARS)
def test_invalid_tar_yields_the_items_before_the_problem(
    list_bytes: Callable[[bytes], list[Item]], broken: bytes
) -> None:
    first, problem = list_bytes(FIRST + broken + END)
    assert (first.problem, first.key, first.offset, first.size) == ("", "t--a", 512, 5)
    assert problem.problem == "invalid_tar"
    assert problem.detail.startswith("t.tar is truncated, damaged, or not an uncompressed tar: ")


def test_many_extended_headers_in_a_row_apply_to_the_next_member(list_bytes: Callable[[bytes], list[Item]]) -> None:
    names = b"".join(build_pax(b"18 path=%05d.jpg\n" % i) for i in range(2000))
    (item,) = list_bytes(names + build_header("x", size=0) + END)
    assert (item.key, item.size) == ("t--01999", 0)


def test_member_without_data_is_not_skipped_by_its_size(list_bytes: Callable[[bytes], list[Item]]) -> None:
    (item,) = list_bytes(build_header("link", kind=b"2", size=1 << 60) + FIRST + END)
    assert (item.key, item.offset) == ("t--a", 1024)


def test_group_reads_one_image_and_counts_further_ones(list_bytes: Callable[[bytes], list[Item]]) -> None:
    members = b"".join(build_header(f"a.{i}.jpg") for i in range(3)) + build_header("a.0.jpg", size=2) + b"x" * 512
    *counted, item = list_bytes(members + END)
    assert (item.suffix, item.offset, item.size) == ("jpg", 4 * 512, 2)
    assert [(problem.key, problem.problem) for problem in counted] == [("t--a", "invalid_record")] * 3
    assert [problem.detail.split(": ")[1] for problem in counted] == ["a.1.jpg", "a.2.jpg", "a.0.jpg"]


IRREGULAR_MEMBERS = [
    pytest.param(
        build_header(kind=b"S", size=700) + b"9" * 1024, "b.jpg: a sparse file", id="sparse file of old GNU tar"
    ),
    pytest.param(
        build_header(kind=b"S", size=5, sparse_map=True) + SPARSE_MAP + b"9" * 512,
        "b.jpg: a sparse file",
        id="sparse file of old GNU tar with a long map",
    ),
    pytest.param(
        build_pax(b"22 GNU.sparse.major=1\n", b"25 GNU.sparse.name=b.jpg\n") + build_header("x", size=5) + b"9" * 512,
        "b.jpg: a sparse file",
        id="sparse file in pax records",
    ),
    pytest.param(build_header(kind=b"1", size=1 << 60), "b.jpg: a hard link", id="hard link"),
    pytest.param(build_header("b.txt", kind=b"2"), "b.txt: a symbolic link", id="symbolic link"),
    pytest.param(build_header("b.json", kind=b"3"), "b.json: a device", id="device"),
    pytest.param(build_header(kind=b"M", size=5) + b"9" * 512, "b.jpg: a file of the unknown type", id="unknown type"),
]


@pytest.mark.parametrize(("member", "detail"), IRREGULAR_MEMBERS)
def test_irregular_member_is_counted_and_the_next_one_is_read(
    list_bytes: Callable[[bytes], list[Item]], member: bytes, detail: str
) -> None:
    problem, item = list_bytes(member + FIRST + END)
    assert (problem.problem, problem.key) == ("irregular_file", "t--b")
    assert problem.detail.startswith(f"t.tar: {detail}")
    assert (item.key, item.problem, item.size) == ("t--a", "", 5)


def test_sparse_file_that_gnu_tar_writes_is_counted_and_the_next_one_is_read(tmp_path: Path) -> None:
    with (tmp_path / "b.jpg").open("wb") as file:
        for number in range(30):  # more holes than a header has place for
            file.seek(number << 17)
            file.write(b"data")
    (tmp_path / "c.jpg").write_bytes(b"image")
    for form in ("gnu", "posix"):
        command = ["tar", "--sparse", f"--format={form}", "-cf", f"{form}.tar", "b.jpg", "c.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        problem, item = list_tar(tmp_path / f"{form}.tar", "s", DataRoots.resolve(tmp_path))
        assert (problem.key, problem.problem, problem.detail) == (
            f"{form}--b",
            "irregular_file",
            f"{form}.tar: b.jpg: a sparse file; write the tar without --sparse",
        )
        assert (item.key, item.size) == (f"{form}--c", 5)


def build_file(name: str, data: bytes) -> bytes:
    return build_header(name, size=len(data)) + data + bytes(-len(data) % BLOCK_BYTES)


UNREAD_CAPTIONS = [
    pytest.param(b'{"caption": "' + b"x" * (1 << 20) + b'"}', "a.json is larger than 1.0 MiB", id="too large"),
    pytest.param(b'["caption"]', "a.json is not a JSON object", id="no object"),
]


@pytest.mark.parametrize(("record", "detail"), UNREAD_CAPTIONS)
def test_json_that_is_not_read_is_counted(
    list_bytes: Callable[[bytes], list[Item]], record: bytes, detail: str
) -> None:
    (item,) = list_bytes(FIRST + build_file("a.json", record) + END)
    assert (item.key, item.problem, item.detail) == ("t--a", "invalid_record", f"t.tar: {detail}")


def test_caption_that_is_not_adjacent_to_its_image_is_counted(list_bytes: Callable[[bytes], list[Item]]) -> None:
    items = list_bytes(FIRST + build_file("b.jpg", b"image") + build_file("a.txt", b"a caption") + END)
    assert [(item.key, item.problem) for item in items] == [("t--a", ""), ("t--b", ""), ("t--a", "missing")]
    assert items[2].detail.startswith("t.tar: a has a caption but no image; write the files of a key in succession")


def write_legal_tar(path: Path, form: int) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(NAMES):
            member = build_member(name, size=0 if name in ("folder/", "link", "hard") else number * 300)
            member.type = {"folder/": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}.get(
                name, tarfile.REGTYPE
            )
            member.linkname = "a.jpg" if name in ("link", "hard") else ""
            tar.addfile(member, io.BytesIO(bytes(member.size)))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_legal_tar_has_the_members_that_tarfile_reads(tmp_path: Path, form: int) -> None:
    path = tmp_path / "t.tar"
    write_legal_tar(path, form)
    with tarfile.open(path) as tar:
        expected = [
            TarMember(name=member.name, offset=member.offset_data, size=member.size)
            for member in tar
            if member.isfile()
        ]
    with path.open("rb") as file:
        members = list(iter_tar_members(file))
    assert [member for member in members if not member.problem] == expected
    assert [member.name for member in members if member.problem] == ["link", "hard"]
    assert len(expected) == len(NAMES) - 3


def test_file_above_eight_gib_has_its_size(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "t.tar"
        size = 9 << 30
        with path.open("wb") as file:
            file.write(build_member("a.jpg", size).tobuf(form))
            file.truncate(file.tell() + size + len(END))
        with path.open("rb") as file:
            assert [member.size for member in iter_tar_members(file)] == [size]
