"""Checks of a stage's own files: every sample is used as often as the recipe says; how much work was repeated."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGES_PER_UNIT = 128
"""Images that curation verifies at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageAudit:
    """How often the result of one stage uses its samples."""

    duplicates: int
    """Uses of samples beyond the number of epochs."""
    missing: int
    """Uses of samples that the number of epochs requires and that did not happen."""
    skipped: int = 0
    """Uses that the trainer skipped on purpose and recorded as skipped, around a loss that was not finite."""
    digest: str = ""
    """Hash of the stage's result: weights, shards or answers."""


class TrainingLog:
    """The sample log and the lineage of a training stage: attempts/N.samples.jsonl and attempts/N.json."""

    def __init__(self, output: Path) -> None:
        self._folder = output / "attempts"

    def read_starts(self) -> dict[int, int]:
        """Return the step from which each started attempt resumed."""
        found = {}
        for path in self._folder.glob("*.json"):
            if path.stem.isdigit() and (data := path.read_bytes()):
                start = json.loads(data).get("start")
                found[int(path.stem)] = 0 if start is None else start["step"]
        return dict(sorted(found.items()))

    def read_entries(self, attempt: int) -> list[tuple[int, dict[str, Any]]]:
        """Return the logged steps of an attempt with their entries; incomplete lines are ignored."""
        path, found = self._folder / f"{attempt}.samples.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            found.append((entry["step"], entry))
        return found

    def trace_result(self) -> dict[int, dict[str, Any]]:
        """Return the entries behind the final weights by step: of each attempt those before the next one's start."""
        steps: dict[int, dict[str, Any]] = {}
        for attempt, start in self.read_starts().items():
            steps = {step: entry for step, entry in steps.items() if step <= start}
            steps |= dict(self.read_entries(attempt))
        return steps

    def count_repeated(self, attempt: int, until: int) -> int:
        """Return how many steps of attempts `attempt` … `until` - 1 were repeated later.

        If both are equal, return how many steps the attempt itself repeated, after a restart in place.
        """
        if attempt == until:
            steps = [step for step, _ in self.read_entries(attempt)]
            return len(steps) - len(set(steps))
        later = {n: start for n, start in self.read_starts().items() if n > attempt}
        first = min((start for n, start in later.items() if n <= until), default=0)
        return sum(len({s for s, _ in self.read_entries(n) if s > first}) for n in range(attempt, until))


def audit_stage(storage: Path, stage: dict[str, Any], kind: str, epochs: int) -> StageAudit:
    """Audit a succeeded stage, given its status."""
    output = storage / stage["output"]
    if kind == "curate":
        return audit_curation(output)
    if kind == "evaluate":
        return audit_answers(output)
    config = json.loads((output / "config.json").read_bytes())
    folders = [storage / folder.removeprefix("/data/") for folder in config["train"]["data"]]
    total = sum(count_samples(folder / "shards") for folder in folders)
    entries = TrainingLog(output).trace_result()
    assert sorted(entries) == list(range(1, stage["progress"]["steps"] + 1)), "a step has no entry in the sample log"
    used = Counter(sample for entry in entries.values() for sample in entry["samples"])
    return StageAudit(
        duplicates=sum(max(0, n - epochs) for n in used.values()),
        missing=sum(max(0, epochs - used[sample]) for sample in range(total)),
        skipped=sum(len(entry["samples"]) for entry in entries.values() if entry.get("skipped")),
        digest=hash_file(output / "export/model.safetensors"),
    )


def audit_curation(output: Path) -> StageAudit:
    """Require each selected image once, in one shard; the digest covers all shards."""
    report = json.loads((output / "report/report.json").read_bytes())
    selected = report["outcomes"].get("kept", 0) + report["outcomes"].get("held_out", 0)
    keys, tars = [], sorted(path for split in ("shards", "held-out") for path in (output / split).glob("*.tar"))
    for path in tars:
        with tarfile.open(path) as tar:
            keys += [name.rpartition(".")[0] for name in tar.getnames() if name.endswith(".json")]
    hashes = "".join(hash_file(path) for path in tars)
    return StageAudit(
        duplicates=len(keys) - len(set(keys)),
        missing=selected - len(set(keys)),
        digest=hashlib.sha256(hashes.encode()).hexdigest()[:12],
    )


def audit_answers(output: Path) -> StageAudit:
    """Require one answer per question, and equal answers where a question was answered twice."""
    found: dict[tuple[str, str], list[str]] = {}
    differing = 0
    for benchmark, batch, answers in read_answers(output):
        known = found.setdefault((benchmark, batch), answers)
        differing += sum(a != b for a, b in zip(known, answers, strict=True))
    result = json.loads((output / "result.json").read_bytes())
    text = json.dumps(sorted((*key, *answers) for key, answers in found.items()))
    return StageAudit(
        duplicates=differing,
        missing=result["samples"] - sum(map(len, found.values())),
        digest=hashlib.sha256(text.encode()).hexdigest()[:12],
    )


def count_repeated_answers(output: Path) -> int:
    """Return the number of answers beyond one per question."""
    entries = list(read_answers(output))
    once = {(benchmark, batch): len(answers) for benchmark, batch, answers in entries}
    return sum(len(answers) for _, _, answers in entries) - sum(once.values())


def read_answers(output: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield benchmark, batch and answers of every complete line."""
    for path in sorted((output / "artifacts").glob("answers-*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            yield entry["benchmark"], entry["batch"], entry["answers"]


def read_unit_times(output: Path) -> dict[str, int]:
    """Return when each unit of verified images was written, in nanoseconds, by file name."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "artifacts/rows").glob("*.parquet")}


def count_samples(folder: Path) -> int:
    """Return the number of samples that a folder's manifest lists."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    return sum(shard["samples"] for shard in manifest["shards"])


def hash_file(path: Path) -> str:
    """Return the first 12 hexadecimal digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
