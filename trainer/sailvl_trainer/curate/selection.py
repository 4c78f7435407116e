"""The global pass, done once by one rank: duplicates, the held-out part, and which shard each kept item goes to.

All in DuckDB over the rows' Parquet files, which spills to the stage's own folder, so memory sets no limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import duckdb

from sailvl_trainer.contract import HELD_OUT_DIR, SHARDS_DIR, CurateConfig
from sailvl_trainer.curate.artifacts import Parts, PlannedShard
from sailvl_trainer.curate.dedup import mark_duplicates
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.storage.atomic import sync_file, write_atomic
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.errors import translate_storage_errors


def decide(parts: Parts, config: CurateConfig) -> dict[str, int]:
    """Write decisions, plan and last the list of shards; returns counts by outcome.

    Raises ConfigError if nothing is kept.
    """
    with open_database(parts) as db:
        db.execute("CREATE VIEW ok AS SELECT item, pixels_sha256, phash FROM rows WHERE outcome = 'ok'")
        mark_duplicates(db, exact=config.exact_duplicates, distance=config.perceptual_distance)
        _split(db, config.held_out_fraction)
        _write_decisions(db, parts)
        outcomes: dict[str, int] = dict(db.execute("SELECT outcome, count(*) FROM decisions GROUP BY 1").fetchall())
        shards = _write_plan(db, parts, config.shard_samples)
    if not any(shard.split == SHARDS_DIR for shard in shards):
        raise ConfigError(f"no picture was kept; of the items came {outcomes}: look at the sources and the limits")
    write_atomic(parts.shards, encode(shards))
    return outcomes


@contextmanager
def open_database(parts: Parts) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with a view `rows` of all verified items."""
    spill = parts.folder / "spill"
    spill.mkdir(parents=True, exist_ok=True)
    options = {"temp_directory": str(spill), "preserve_insertion_order": False, "autoinstall_known_extensions": False}
    try:
        with duckdb.connect(config=options) as db:
            db.read_parquet(f"{parts.rows}/*.parquet").create_view("rows")
            yield db
    finally:
        rmtree(spill, ignore_errors=True)


def _split(db: duckdb.DuckDBPyConnection, fraction: float) -> None:
    """Table kept(item, pixels_sha256, held_out), by a hash of the pixels: a picture is held out in every run or in
    none, however much data comes to it and whatever its files are called. Where a part is asked for, it has a member.
    """
    threshold = f"{min(2**64 - 1, int(max(0.0, fraction) * 2**64)):016x}"
    db.execute(
        "CREATE TABLE kept AS SELECT item, pixels_sha256, $1 > 0 AND (draw < $2 OR "
        "row_number() OVER (ORDER BY draw, item) = 1 AND count(*) OVER () > 1) AS held_out "
        "FROM (SELECT item, pixels_sha256, substr(sha256('held-out ' || pixels_sha256), 1, 16) AS draw "
        "FROM ok ANTI JOIN repeats USING (item))",
        [fraction, threshold],
    )


def _write_decisions(db: duckdb.DuckDBPyConnection, parts: Parts) -> None:
    """What became of every item, and of a repeated one, the item that stands for it."""
    db.execute(
        "CREATE TABLE decisions AS SELECT rows.item, CASE WHEN held_out THEN 'held_out' WHEN kept.item IS NOT NULL "
        "THEN 'kept' ELSE coalesce(repeats.outcome, rows.outcome) END AS outcome, first "
        "FROM rows LEFT JOIN kept USING (item) LEFT JOIN repeats USING (item)"
    )
    _copy(db, "SELECT * FROM decisions ORDER BY item", parts.decisions)


def _write_plan(db: duckdb.DuckDBPyConnection, parts: Parts, shard_samples: int) -> list[PlannedShard]:
    """The kept items in their order, which reads the sources from front to end; the held-out ones in the order of
    their hash, so that any first part of them stands for all sources."""
    db.execute(
        f"CREATE TABLE plan AS SELECT item, split, place // {int(shard_samples)} AS shard, place FROM (SELECT item, "
        f"if(held_out, '{HELD_OUT_DIR}', '{SHARDS_DIR}') AS split, row_number() OVER (PARTITION BY held_out "
        "ORDER BY CASE WHEN held_out THEN pixels_sha256 END, item) - 1 AS place FROM kept)"
    )
    _copy(
        db,
        "SELECT split, shard, place, rows.* FROM plan JOIN rows USING (item) ORDER BY split, shard, place",
        parts.plan,
    )
    found = db.execute("SELECT split, shard, count(*) FROM plan GROUP BY ALL ORDER BY split DESC, shard").fetchall()
    return [PlannedShard(split=split, number=number, samples=samples) for split, number, samples in found]


def _copy(db: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    """A query's rows as a Parquet file, whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    quoted = str(temporary).replace("'", "''")
    try:
        with translate_storage_errors(path):
            db.execute(f"COPY ({query}) TO '{quoted}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 8192)")
            sync_file(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
