"""What workers do, in the ledger's buckets: the names that they report, mapped."""

from __future__ import annotations

from sailvl_trainer.contract import Progress

Buckets = dict[str, int]
"""Whole seconds by bucket."""

MAIN = {"curate": "curating", "pretrain": "training", "sft": "training", "evaluate": "evaluating"}
"""Bucket of what a stage's workers do and don't name."""
ACTIVITIES = {
    "starting": "starting",
    "training": "training",
    "dataWait": "dataWait",
    "waiting": "dataWait",
    "checkpoint": "checkpoint",
    "evaluating": "evaluating",
}
"""Bucket of each activity of contract.Progress.seconds."""


def count_seconds(progress: Progress, kind: str) -> Buckets:
    """What the workers say of their time in this attempt, by bucket."""
    seconds: Buckets = {}
    for activity, value in progress.seconds.items():
        bucket = ACTIVITIES.get(activity, MAIN[kind])
        seconds[bucket] = seconds.get(bucket, 0) + round(value)
    return seconds
