"""The global step of curation, on one rank: drop duplicates, hold samples out, assign the rest to shards.

It runs in DuckDB over the Parquet files of verified items. DuckDB spills to the stage's own folder, so that the size of
the data isn't limited by memory. Called by stage.py.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import duckdb

from sailvl_trainer.contract import HELD_OUT_DIR, SHARDS_DIR, CurateConfig
from sailvl_trainer.curate.artifacts import CurationArtifacts, PlannedShard
from sailvl_trainer.curate.dedup import mark_duplicates
from sailvl_trainer.curate.items import OUTSIDE_ADVICE
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.storage.documents import write_document
from sailvl_trainer.storage.files import sync_file, translate_storage_errors


def select_samples(artifacts: CurationArtifacts, config: CurateConfig) -> dict[str, int]:
    """Write the decisions, the plan and, last, the list of shards; return the number of items by outcome.

    Raises ConfigError if no image is kept for training.
    """
    with open_database(artifacts) as db:
        db.execute("CREATE VIEW ok AS SELECT item, pixels_sha256, phash FROM rows WHERE outcome = 'ok'")
        mark_duplicates(db, exact=config.exact_duplicates, distance=config.perceptual_distance)
        _hold_out(db, config.held_out_fraction)
        _write_decisions(db, artifacts)
        outcomes: dict[str, int] = dict(db.execute("SELECT outcome, count(*) FROM decisions GROUP BY 1").fetchall())
        shards = _write_plan(db, artifacts, config.shard_samples)
    if not any(shard.split == SHARDS_DIR for shard in shards):
        advice = f"; a file outside of the source: {OUTSIDE_ADVICE}" if "outside_source" in outcomes else ""
        raise ConfigError(f"all images were dropped ({outcomes}); check the sources and filters{advice}")
    write_document(artifacts.shards, shards, advice="write fewer shards with more samples each")
    return outcomes


@contextmanager
def open_database(artifacts: CurationArtifacts) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database with view `rows` of all verified items."""
    spill = artifacts.folder / "spill"
    spill.mkdir(parents=True, exist_ok=True)
    options = {"temp_directory": str(spill), "preserve_insertion_order": False, "autoinstall_known_extensions": False}
    try:
        with duckdb.connect(config=options) as db:
            read_parquet(db, *sorted(artifacts.rows_folder.glob("*.parquet"))).create_view("rows")
            yield db
    finally:
        rmtree(spill, ignore_errors=True)


def read_parquet(db: duckdb.DuckDBPyConnection, *paths: Path) -> duckdb.DuckDBPyRelation:
    """Read Parquet files whose paths are taken literally: as patterns, `*` and `[x]` would match files of other runs.

    Nor does a folder named `key=value` add a column.
    """
    return db.read_parquet([glob.escape(str(path)) for path in paths], hive_partitioning=False)


def _hold_out(db: duckdb.DuckDBPyConnection, fraction: float) -> None:
    """Create table kept(item, pixels_sha256, held_out).

    A hash of the pixels decides, so that an image is held out in every run or in none, even if data is added or files
    are renamed. If `fraction` is positive and more than one item is kept, at least one is held out.
    """
    threshold = f"{min(2**64 - 1, int(max(0.0, fraction) * 2**64)):016x}"
    db.execute(
        "CREATE TABLE kept AS SELECT item, pixels_sha256, $1 > 0 AND (hash < $2 OR "
        "row_number() OVER (ORDER BY hash, item) = 1 AND count(*) OVER () > 1) AS held_out "
        "FROM (SELECT item, pixels_sha256, substr(sha256('held-out ' || pixels_sha256), 1, 16) AS hash "
        "FROM ok ANTI JOIN duplicates USING (item))",
        [fraction, threshold],
    )


def _write_decisions(db: duckdb.DuckDBPyConnection, artifacts: CurationArtifacts) -> None:
    """Write the final outcome of every item, and for a duplicate the kept item."""
    db.execute(
        "CREATE TABLE decisions AS SELECT rows.item, CASE WHEN held_out THEN 'held_out' WHEN kept.item IS NOT NULL "
        "THEN 'kept' ELSE coalesce(duplicates.outcome, rows.outcome) END AS outcome, duplicate_of "
        "FROM rows LEFT JOIN kept USING (item) LEFT JOIN duplicates USING (item)"
    )
    _copy_to_parquet(db, "SELECT * FROM decisions ORDER BY item", artifacts.decisions)


def _write_plan(db: duckdb.DuckDBPyConnection, artifacts: CurationArtifacts, shard_samples: int) -> list[PlannedShard]:
    """Write the plan, which assigns each kept item to a position in a shard; return the shards.

    Training samples stay in the order of items, so that the sources are read sequentially. Held-out samples are in the
    order of their pixel hashes, so that the first n of them represent all sources.
    """
    db.execute(
        f"CREATE TABLE plan AS SELECT item, split, position // {int(shard_samples)} AS shard, position FROM (SELECT "
        f"item, if(held_out, '{HELD_OUT_DIR}', '{SHARDS_DIR}') AS split, row_number() OVER (PARTITION BY held_out "
        "ORDER BY CASE WHEN held_out THEN pixels_sha256 END, item) - 1 AS position FROM kept)"
    )
    columns = "split, shard, position"
    query = f"SELECT {columns}, rows.* FROM plan JOIN rows USING (item) ORDER BY {columns}"
    _copy_to_parquet(db, query, artifacts.plan)
    rows = db.execute("SELECT split, shard, count(*) FROM plan GROUP BY ALL ORDER BY split DESC, shard").fetchall()
    return [PlannedShard(split=split, number=number, samples=samples) for split, number, samples in rows]


def _copy_to_parquet(db: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    """Write the rows of a query to a Parquet file atomically."""
    temporary = path.with_name(f".{path.name}")
    quoted = str(temporary).replace("'", "''")
    try:
        with translate_storage_errors(path):
            db.execute(f"COPY ({query}) TO '{quoted}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 8192)")
            sync_file(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
