"""Statistics of a finished curation: outcomes, sources, word counts and sizes, computed by DuckDB over the artifacts.

Called by report.py, which writes them as report.json; stage.py reads the stage's metrics from that file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from sailvl_trainer.curate.artifacts import CurationArtifacts
from sailvl_trainer.curate.selection import open_database, read_parquet
from sailvl_trainer.storage.codec import decode

REPORT_JSON = "report.json"
KEPT_OUTCOMES = ("kept", "held_out")
DUPLICATE_OUTCOMES = ("duplicate", "near_duplicate")
MAX_FREQUENT = 20
"""Number of the most frequent n-grams in the report."""
WORD_PATTERN = r"[\p{L}\p{N}]+(?:['’]\p{L}+)?"
"""A word is a sequence of letters and digits. A Chinese character is a word of its own."""
SOURCES_QUERY = "SELECT source FROM decided GROUP BY source ORDER BY min(item)"
UNIGRAMS_QUERY = "SELECT unnest(words) AS gram FROM kept"
BIGRAMS_QUERY = (
    "SELECT pair[1] || ' ' || pair[2] AS gram "
    "FROM (SELECT unnest(list_zip(words[:-2], words[2:])) AS pair FROM kept WHERE len(words) > 1)"
)
Counts = dict[str, int]
Histogram = tuple[tuple[float, int], ...]
"""Lower edge and count of each bin, in ascending order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NgramStatistics:
    """N-grams of the kept captions, in lower case."""

    total: int
    distinct: int
    once: int
    """Number of distinct n-grams that occur once."""
    frequent: tuple[tuple[str, int], ...]
    """The most frequent n-grams with their counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceStatistics:
    """Statistics of one source; means and medians are those of its kept samples."""

    name: str
    items: int
    outcomes: Counts
    mean_word_count: float
    """Mean word count of the captions."""
    median_width: float
    median_height: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Content of report.json; means and histograms are those of the kept samples."""

    items: int
    outcomes: Counts
    """Number of items by outcome, in descending order: kept, held_out, and the reasons why the others were dropped."""
    sources: tuple[SourceStatistics, ...]
    unigrams: NgramStatistics
    bigrams: NgramStatistics
    mean_word_count: float
    """Mean word count of the captions."""
    mean_tiles: float
    word_count: Histogram
    longer_side: Histogram
    aspect_ratio: Histogram
    tiles: Histogram

    @property
    def kept_count(self) -> int:
        """Number of samples in shards, the held-out ones included."""
        return sum(self.outcomes.get(name, 0) for name in KEPT_OUTCOMES)

    @property
    def duplicate_count(self) -> int:
        """Number of items dropped as duplicates or near duplicates."""
        return sum(self.outcomes.get(name, 0) for name in DUPLICATE_OUTCOMES)

    @property
    def metrics(self) -> dict[str, float]:
        """The stage's metrics: kept, heldOut, dropped, duplicates, and every reason for dropping in camel case."""
        reasons = {_to_camel_case(name): float(n) for name, n in self.outcomes.items() if name not in KEPT_OUTCOMES}
        totals = {"kept": self.kept_count, "heldOut": self.outcomes.get("held_out", 0)}
        totals |= {"dropped": self.items - self.kept_count, "duplicates": self.duplicate_count}
        return {name: float(n) for name, n in totals.items()} | reasons


def read_statistics(folder: Path) -> Statistics:
    """Read report.json from the folder of a finished report."""
    return decode(Statistics, (folder / REPORT_JSON).read_bytes())


def compute_statistics(artifacts: CurationArtifacts) -> Statistics:
    """Compute all statistics from the verified items and the decisions."""
    with open_decided(artifacts) as db:
        return Statistics(
            items=_query_scalar(db, "SELECT count(*) FROM decided"),
            outcomes=_count_outcomes(db, "true"),
            sources=tuple(_describe_source(db, name) for (name,) in db.execute(SOURCES_QUERY).fetchall()),
            unigrams=_count_ngrams(db, UNIGRAMS_QUERY),
            bigrams=_count_ngrams(db, BIGRAMS_QUERY),
            mean_word_count=round(_query_scalar(db, "SELECT coalesce(avg(len(words)), 0) FROM kept"), 2),
            mean_tiles=round(_query_scalar(db, "SELECT coalesce(avg(tiles), 0) FROM kept"), 2),
            word_count=_build_histogram(db, "len(words)"),
            longer_side=_build_histogram(db, "2 ** (floor(log2(greatest(width, height)) * 4) / 4)"),
            aspect_ratio=_build_histogram(db, "2 ** (round(log2(width / height) * 4) / 4)"),
            tiles=_build_histogram(db, "tiles"),
        )


@contextmanager
def open_decided(artifacts: CurationArtifacts) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database with view `decided` and table `kept`.

    `decided`: every item with its final outcome and column `duplicate_of`. `kept`: the kept samples with `words`, the
    caption as a list.
    """
    with open_database(artifacts) as db:
        read_parquet(db, artifacts.decisions).create_view("decisions")
        db.execute(
            "CREATE VIEW decided AS SELECT rows.* REPLACE (decisions.outcome AS outcome), decisions.duplicate_of "
            "FROM rows JOIN decisions USING (item)"
        )
        db.execute(
            "CREATE TABLE kept AS SELECT source, width, height, tiles, "
            r"regexp_extract_all(regexp_replace(lower(text), '(\p{Han})', ' \1 ', 'g'), $1) AS words "
            "FROM decided WHERE outcome IN $2",
            [WORD_PATTERN, list(KEPT_OUTCOMES)],
        )
        yield db


def _describe_source(db: duckdb.DuckDBPyConnection, name: str) -> SourceStatistics:
    query = (
        "SELECT coalesce(avg(len(words)), 0), coalesce(median(width), 0), coalesce(median(height), 0) "
        "FROM kept WHERE source = $1"
    )
    word_count, width, height = db.execute(query, [name]).fetchall()[0]
    outcomes = _count_outcomes(db, "source = $1", name)
    return SourceStatistics(
        name=name,
        items=sum(outcomes.values()),
        outcomes=outcomes,
        mean_word_count=round(word_count, 2),
        median_width=width,
        median_height=height,
    )


def _count_outcomes(db: duckdb.DuckDBPyConnection, condition: str, *values: str) -> Counts:
    query = f"SELECT outcome, count(*) AS n FROM decided WHERE {condition} GROUP BY 1 ORDER BY n DESC, outcome"
    return dict(db.execute(query, values).fetchall())


def _count_ngrams(db: duckdb.DuckDBPyConnection, ngrams_query: str) -> NgramStatistics:
    db.execute(f"CREATE OR REPLACE TABLE counted AS SELECT gram, count(*) AS n FROM ({ngrams_query}) GROUP BY gram")
    query = "SELECT coalesce(sum(n), 0)::BIGINT, count(*), count(*) FILTER (n = 1) FROM counted"
    total, distinct, once = db.execute(query).fetchall()[0]
    frequent = db.execute(f"SELECT gram, n FROM counted ORDER BY n DESC, gram LIMIT {MAX_FREQUENT}").fetchall()
    return NgramStatistics(total=total, distinct=distinct, once=once, frequent=tuple(frequent))


def _build_histogram(db: duckdb.DuckDBPyConnection, edge: str) -> Histogram:
    """Count the kept samples by a SQL expression that gives the lower edge of their bin."""
    rows = db.execute(f"SELECT ({edge})::DOUBLE AS edge, count(*) FROM kept GROUP BY edge ORDER BY edge").fetchall()
    return tuple((round(edge, 4), count) for edge, count in rows)


def _query_scalar(db: duckdb.DuckDBPyConnection, query: str) -> Any:
    return db.execute(query).fetchall()[0][0]


def _to_camel_case(name: str) -> str:
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name)
