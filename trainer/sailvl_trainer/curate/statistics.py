"""What came in, what was kept and why the rest was dropped: counted by DuckDB over the parts, out of core."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from sailvl_trainer.curate.artifacts import Parts
from sailvl_trainer.curate.selection import open_database
from sailvl_trainer.storage.codec import decode

REPORT_JSON = "report.json"
KEPT = ("kept", "held_out")
DUPLICATES = ("duplicate", "near_duplicate")
FREQUENT = 20
WORD = r"[\p{L}\p{N}]+(?:['’]\p{L}+)?"
"""Letters and digits; a Chinese character is a word by itself."""
SOURCES = "SELECT source FROM decided GROUP BY source ORDER BY min(item)"
BIGRAMS = (
    "SELECT pair[1] || ' ' || pair[2] AS gram "
    "FROM (SELECT unnest(list_zip(words[:-2], words[2:])) AS pair FROM kept WHERE len(words) > 1)"
)
Counts = dict[str, int]
Histogram = tuple[tuple[float, int], ...]
"""Left edge of a bin, and how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ngrams:
    """Of the kept captions' words, in small letters."""

    total: int
    distinct: int
    once: int
    """Of the distinct ones: seen a single time."""
    frequent: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    name: str
    items: int
    outcomes: Counts
    mean_words: float
    """Of the kept captions."""
    median_width: float
    median_height: float
    """Of the kept pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """report.json."""

    items: int
    outcomes: Counts
    """kept, held_out (written too, apart), and the reasons of the rest; the most frequent first."""
    sources: tuple[Source, ...]
    unigrams: Ngrams
    bigrams: Ngrams
    mean_words: float
    mean_tiles: float
    caption_words: Histogram
    longer_side: Histogram
    aspect_ratio: Histogram
    tiles: Histogram

    @property
    def kept(self) -> int:
        """Samples in shards, the held-out ones among them."""
        return sum(self.outcomes.get(name, 0) for name in KEPT)

    @property
    def duplicates(self) -> int:
        return sum(self.outcomes.get(name, 0) for name in DUPLICATES)

    @property
    def metrics(self) -> dict[str, float]:
        """For the result: kept, heldOut, dropped, duplicates, and every reason in camel case."""
        reasons = {_camel(name): float(n) for name, n in self.outcomes.items() if name not in KEPT}
        totals = {"kept": self.kept, "heldOut": self.outcomes.get("held_out", 0)}
        totals |= {"dropped": self.items - self.kept, "duplicates": self.duplicates}
        return {name: float(n) for name, n in totals.items()} | reasons


def read_statistics(folder: Path) -> Statistics:
    """Of a finished report."""
    return decode(Statistics, (folder / REPORT_JSON).read_bytes())


def measure(parts: Parts) -> Statistics:
    """All of it, from the rows and what was decided of them."""
    with open_decided(parts) as db:
        return Statistics(
            items=_scalar(db, "SELECT count(*) FROM decided"),
            outcomes=_outcomes(db, "true"),
            sources=tuple(_source(db, name) for (name,) in db.execute(SOURCES).fetchall()),
            unigrams=_ngrams(db, "SELECT unnest(words) AS gram FROM kept"),
            bigrams=_ngrams(db, BIGRAMS),
            mean_words=round(_scalar(db, "SELECT coalesce(avg(len(words)), 0) FROM kept"), 2),
            mean_tiles=round(_scalar(db, "SELECT coalesce(avg(tiles), 0) FROM kept"), 2),
            caption_words=_histogram(db, "len(words)"),
            longer_side=_histogram(db, "2 ** (floor(log2(greatest(width, height)) * 4) / 4)"),
            aspect_ratio=_histogram(db, "2 ** (round(log2(width / height) * 4) / 4)"),
            tiles=_histogram(db, "tiles"),
        )


@contextmanager
def open_decided(parts: Parts) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with view decided (every row with its final outcome and `first`) and table kept (with its words)."""
    with open_database(parts) as db:
        db.read_parquet(str(parts.decisions)).create_view("decisions")
        db.execute(
            "CREATE VIEW decided AS SELECT rows.* REPLACE (decisions.outcome AS outcome), decisions.first "
            "FROM rows JOIN decisions USING (item)"
        )
        db.execute(
            "CREATE TABLE kept AS SELECT source, width, height, tiles, "
            r"regexp_extract_all(regexp_replace(lower(text), '(\p{Han})', ' \1 ', 'g'), $1) AS words "
            "FROM decided WHERE outcome IN $2",
            [WORD, list(KEPT)],
        )
        yield db


def _source(db: duckdb.DuckDBPyConnection, name: str) -> Source:
    query = (
        "SELECT coalesce(avg(len(words)), 0), coalesce(median(width), 0), coalesce(median(height), 0) "
        "FROM kept WHERE source = $1"
    )
    words, width, height = db.execute(query, [name]).fetchall()[0]
    outcomes = _outcomes(db, "source = $1", name)
    return Source(
        name=name,
        items=sum(outcomes.values()),
        outcomes=outcomes,
        mean_words=round(words, 2),
        median_width=width,
        median_height=height,
    )


def _outcomes(db: duckdb.DuckDBPyConnection, condition: str, *values: str) -> Counts:
    query = f"SELECT outcome, count(*) AS n FROM decided WHERE {condition} GROUP BY 1 ORDER BY n DESC, outcome"
    return dict(db.execute(query, values).fetchall())


def _ngrams(db: duckdb.DuckDBPyConnection, grams: str) -> Ngrams:
    db.execute(f"CREATE OR REPLACE TABLE counted AS SELECT gram, count(*) AS n FROM ({grams}) GROUP BY gram")
    query = "SELECT coalesce(sum(n), 0)::BIGINT, count(*), count(*) FILTER (n = 1) FROM counted"
    total, distinct, once = db.execute(query).fetchall()[0]
    frequent = db.execute(f"SELECT gram, n FROM counted ORDER BY n DESC, gram LIMIT {FREQUENT}").fetchall()
    return Ngrams(total=total, distinct=distinct, once=once, frequent=tuple(frequent))


def _histogram(db: duckdb.DuckDBPyConnection, edge: str) -> Histogram:
    rows = db.execute(f"SELECT ({edge})::DOUBLE AS edge, count(*) FROM kept GROUP BY edge ORDER BY edge").fetchall()
    return tuple((round(edge, 4), number) for edge, number in rows)


def _scalar(db: duckdb.DuckDBPyConnection, query: str) -> Any:
    return db.execute(query).fetchall()[0][0]


def _camel(name: str) -> str:
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name)
