"""The record of the files of other runs whose hashes this run has verified, so that each file is read once per run.

It consists of JSON lines in files below the run's own directory, one file per attempt and process. A file counts as
verified while its size, time of modification and expected hash are those of a line; all stages of the run use all
lines. Each process appends to its own file only, and a line that is lost costs no more than another reading.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.documents import iterate_lines
from sailvl_trainer.storage.files import list_names, translate_read_errors, translate_storage_errors, write_atomic
from sailvl_trainer.storage.hashes import HashedFile, describe_difference
from sailvl_trainer.storage.layout import StageFiles

STAT_THREADS = 16
"""Threads that ask for the sizes of files, because each answer of a network volume takes about a millisecond."""
SUFFIX = ".jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedFile:
    """One line of the record: a file whose content had this hash when it had this size and time of modification."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


class VerifiedFiles:
    """The record of a run, as one process of a stage's attempt reads and extends it; thread-safe."""

    def __init__(self, files: StageFiles, *, attempt: int, writer: str) -> None:
        """`writer` is the name of this process, which no other one of the attempt has."""
        self._folder, self._roots = files.verified, files.roots
        self._stage, self._attempt = files.output.name, attempt
        self._path = self._folder / f"{self._stage}-{attempt}-{writer}{SUFFIX}"
        self._lock = threading.Lock()

    def list_pending(self, files: Sequence[HashedFile], on_file: Callable[[], None]) -> list[int]:
        """Return the numbers of the files that aren't recorded as they are now; `on_file` is called after each file.

        Raises StorageError if the record can't be read, or a file's size can't.
        """
        states = []
        with ThreadPoolExecutor(STAT_THREADS) as threads:
            for state in threads.map(_describe_state, files):
                on_file()
                states.append(state)
        wanted = set(states)
        names = (name for name in list_names(self._folder) if name.endswith(SUFFIX))
        verified = {line for name in names for line in self._iterate(self._folder / name) if line in wanted}
        return [number for number, state in enumerate(states) if state not in verified]

    def verify(self, file: HashedFile, roots: DataRoots, on_chunk: Callable[[], None]) -> str:
        """Return how a file differs from its manifest; if it doesn't, record it and return an empty string.

        `on_chunk` is called after each chunk. Raises StorageError if the file can't be read or recorded.
        """
        before = _describe_state(file)
        problem = describe_difference(file, roots, on_chunk)
        if not problem and before is not None and before == _describe_state(file):
            with self._lock, translate_storage_errors(self._path):
                self._folder.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab") as record:
                    record.write(encode(before) + b"\n")
        return problem

    def merge_superseded(self) -> None:
        """Merge what this stage's earlier attempts recorded, if later lines supersede at least half of it.

        Volumes whose times of modification change with each mount make every attempt record all files again; the record
        thus stays below three lines per file and stage. Called by one process per attempt. Raises StorageError.
        """
        paths, newest, count = self._list_earlier(), dict[str, VerifiedFile](), 0
        for path in paths:
            for line in self._iterate(path):
                newest[line.path], count = line, count + 1
        if count < 2 * max(1, len(newest)):
            return
        merged = paths[-1].with_name(f"{self._stage}-{self._parse_attempt(paths[-1].name)}-merged{SUFFIX}")
        write_atomic(merged, b"".join(encode(line) + b"\n" for line in newest.values()))
        for path in paths:
            if path != merged:
                with translate_storage_errors(path):
                    path.unlink(missing_ok=True)

    def _list_earlier(self) -> list[Path]:
        """Return the files of this stage's earlier attempts, which no longer grow, in the order of the attempts."""
        found = ((self._parse_attempt(name), name) for name in list_names(self._folder))
        return [self._folder / name for attempt, name in sorted(found) if 0 <= attempt < self._attempt]

    def _parse_attempt(self, name: str) -> int:
        """Return the attempt of this stage that wrote a file; -1 if none did."""
        found = re.fullmatch(rf"{re.escape(self._stage)}-(\d{{1,9}})-(\w+){re.escape(SUFFIX)}", name, re.ASCII)
        return -1 if found is None else int(found[1])

    def _iterate(self, path: Path) -> Iterator[VerifiedFile]:
        return iterate_lines(VerifiedFile, path, self._roots)


def _describe_state(file: HashedFile) -> VerifiedFile | None:
    """Return the record of a file as it is now, if it has the expected hash; None if it doesn't exist."""
    try:
        with translate_read_errors(file.path):
            state = file.path.stat()
    except OSError:
        return None
    return VerifiedFile(
        path=os.path.abspath(file.path),
        bytes=state.st_size,
        mtime_ns=state.st_mtime_ns,
        sha256=file.expected.sha256,
    )
