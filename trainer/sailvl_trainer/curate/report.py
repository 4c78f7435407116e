"""The report of a curate stage: report.json for programs, index.html with plots and pictures for people."""

from __future__ import annotations

from pathlib import Path

from sailvl_trainer.contract import CurateConfig
from sailvl_trainer.curate import gallery
from sailvl_trainer.curate.artifacts import Parts
from sailvl_trainer.curate.plots import draw_plots
from sailvl_trainer.curate.statistics import KEPT, REPORT_JSON, measure, open_decided
from sailvl_trainer.reporting.render import render
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode

REASONS = {
    "kept": "kept for training",
    "held_out": "kept for the held-out loss",
    "duplicate": "the same pixels as an earlier one",
    "near_duplicate": "looks like an earlier one",
    "no_caption": "no caption",
    "long_caption": "caption too long",
    "too_small": "picture too small",
    "too_large": "picture too large to decode safely",
    "unreadable": "picture broken",
    "missing": "file not there",
    "bad_record": "line of a caption file that is no record",
    "broken_tar": "tar breaks off",
}


def write_report(parts: Parts, folder: Path, config: CurateConfig) -> None:
    """Both files, from the parts of a finished stage; report.json last."""
    statistics = measure(parts)
    with open_decided(parts) as db:
        kept, dropped = gallery.choose_kept(db), gallery.choose_dropped(db)
    page = render(
        "curate/report.html.jinja",
        statistics=statistics,
        config=config,
        reasons=REASONS,
        kept_names=KEPT,
        plots=draw_plots(statistics),
        kept=kept,
        dropped=dropped,
    )
    write_atomic(folder / "index.html", page)
    write_atomic(folder / REPORT_JSON, encode(statistics))
