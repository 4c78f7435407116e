"""What a stage's own files say of its work: every sample as often as asked for, and how much was done twice."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNIT = 128
"""Pictures that curation verifies at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Books:
    """Of one stage."""

    doubled: int
    """Uses of samples beyond what was asked for."""
    missing: int
    left_out: int = 0
    """Uses that the trainer left out on purpose, and said so: batches around a number that was none."""
    weights: str = ""
    """Hash of what came out."""


class TrainingFiles:
    """The sample ledger and the lineage of a training stage: attempts/N.samples.jsonl and attempts/N.json."""

    def __init__(self, output: Path) -> None:
        self._folder = output / "attempts"

    def starts(self) -> dict[int, int]:
        """Attempts that began, and the step each began from."""
        found = {}
        for path in self._folder.glob("*.json"):
            if path.stem.isdigit() and (data := path.read_bytes()):
                start = json.loads(data).get("start")
                found[int(path.stem)] = 0 if start is None else start["step"]
        return dict(sorted(found.items()))

    def lines(self, attempt: int) -> list[tuple[int, dict[str, Any]]]:
        """Steps with their entries as they were written; a torn line is none."""
        path, found = self._folder / f"{attempt}.samples.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            found.append((entry["step"], entry))
        return found

    def chain(self) -> dict[int, dict[str, Any]]:
        """Step to entry of the weights that came out: of an attempt, what lies before the next one's start."""
        steps: dict[int, dict[str, Any]] = {}
        for attempt, start in self.starts().items():
            steps = {step: entry for step, entry in steps.items() if step <= start}
            steps |= dict(self.lines(attempt))
        return steps

    def count_lost(self, attempt: int, until: int) -> int:
        """Steps of attempts `attempt` … `until` - 1 that were done again; of one alone, those done twice in it."""
        if attempt == until:
            steps = [step for step, _ in self.lines(attempt)]
            return len(steps) - len(set(steps))
        later = {n: start for n, start in self.starts().items() if n > attempt}
        first = min((start for n, start in later.items() if n <= until), default=0)
        return sum(len({s for s, _ in self.lines(n) if s > first}) for n in range(attempt, until))


def audit(storage: Path, stage: dict[str, Any], kind: str, epochs: int) -> Books:
    """Of a stage that has succeeded, by its status."""
    output = storage / stage["output"]
    if kind == "curate":
        return audit_curation(output)
    if kind == "evaluate":
        return audit_answers(output)
    config = json.loads((output / "config.json").read_bytes())
    folders = [storage / folder.removeprefix("/data/") for folder in config["train"]["data"]]
    total = sum(count_samples(folder / "shards") for folder in folders)
    chain = TrainingFiles(output).chain()
    assert sorted(chain) == list(range(1, stage["progress"]["steps"] + 1)), "every step has a line"
    used = Counter(sample for entry in chain.values() for sample in entry["samples"])
    return Books(
        doubled=sum(max(0, n - epochs) for n in used.values()),
        missing=sum(max(0, epochs - used[sample]) for sample in range(total)),
        left_out=sum(len(entry["samples"]) for entry in chain.values() if entry.get("skipped")),
        weights=hash_file(output / "export/model.safetensors"),
    )


def audit_curation(output: Path) -> Books:
    """Every kept picture is in one shard, once; the hash is that of all shards."""
    report = json.loads((output / "report/report.json").read_bytes())
    kept = report["outcomes"].get("kept", 0) + report["outcomes"].get("held_out", 0)
    keys, tars = [], sorted(path for split in ("shards", "held-out") for path in (output / split).glob("*.tar"))
    for path in tars:
        with tarfile.open(path) as tar:
            keys += [name.rpartition(".")[0] for name in tar.getnames() if name.endswith(".json")]
    hashes = "".join(hash_file(path) for path in tars)
    return Books(
        doubled=len(keys) - len(set(keys)),
        missing=kept - len(set(keys)),
        weights=hashlib.sha256(hashes.encode()).hexdigest()[:12],
    )


def audit_answers(output: Path) -> Books:
    """Every question has one answer, and whoever answered twice said the same."""
    found: dict[tuple[str, str], list[str]] = {}
    differing = 0
    for benchmark, batch, answers in read_answers(output):
        known = found.setdefault((benchmark, batch), answers)
        differing += sum(a != b for a, b in zip(known, answers, strict=True))
    result = json.loads((output / "result.json").read_bytes())
    words = json.dumps(sorted((*key, *answers) for key, answers in found.items()))
    return Books(
        doubled=differing,
        missing=result["samples"] - sum(map(len, found.values())),
        weights=hashlib.sha256(words.encode()).hexdigest()[:12],
    )


def count_answered_twice(output: Path) -> int:
    """Questions beyond one answer each."""
    entries = list(read_answers(output))
    once = {(benchmark, batch): len(answers) for benchmark, batch, answers in entries}
    return sum(len(answers) for _, _, answers in entries) - sum(once.values())


def read_answers(output: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Benchmark, batch and answers of every whole line."""
    for path in sorted((output / "artifacts").glob("answers-*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            yield entry["benchmark"], entry["batch"], entry["answers"]


def read_units(output: Path) -> dict[str, int]:
    """Curation's verified units, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "artifacts/rows").glob("*.parquet")}


def count_samples(folder: Path) -> int:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    return sum(shard["samples"] for shard in manifest["shards"])


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
