"""Decide whether a stage's result is there already, and whether another run's result may be taken for it.

Another run's files may have been damaged or changed since its result was written, so their hashes are verified before
the result is reused. If one differs, the stage is computed again. Called by rank/main.py before the stage runs. Most
results are found earlier, by the worker, which then starts no ranks; see worker/reused_result.py.
"""

from __future__ import annotations

import logging

from sailvl_trainer.contract import CONFIG_FILE, Result
from sailvl_trainer.errors import DataError
from sailvl_trainer.rank.collectives import all_gather_values, broadcast_value
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.file_verification import describe_damage
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.files import write_atomic
from sailvl_trainer.storage.lineage import claim_stage
from sailvl_trainer.storage.result_files import list_result_files

logger = logging.getLogger(__name__)


def find_result_or_claim(context: Context) -> Result | None:
    """Return the stage's result if there is a usable one; else claim the stage for this attempt. COLLECTIVE.

    After a restart in place the result may be this attempt's own, written before another rank failed.
    """
    found = broadcast_value(list[Result], _find_result(context) if context.is_first else None)
    if found and not _is_usable(context, found[0]):
        found = []
    broadcast_value(bool, _record_decision(context, found) if context.is_first else None)
    return found[0] if found else None


def _find_result(context: Context) -> list[Result]:
    found = context.files.find_result()
    return [] if found is None else [found]


def _is_usable(context: Context, result: Result) -> bool:
    """Return whether all files of a result are as their manifests describe them; this run's own are. COLLECTIVE."""
    output = context.files.storage / result.output
    if context.files.is_own(result) or context.files.is_from_this_run(output):
        return True
    try:
        files, problem = list_result_files(context.stage.kind, output, context.files.storage), ""
    except DataError as error:
        files, problem = [], str(error)
    problems = [text for text in all_gather_values(str, problem) if text]
    problem = problems[0] if problems else describe_damage(context, files, context.files.roots)
    if problem and context.is_first:
        logger.warning("the result in %s is not reused but computed again: %s", result.output, problem)
    return not problem


def _record_decision(context: Context, found: list[Result]) -> bool:
    """Record which result is reused; if none is, claim the stage and write its config beside the claim.

    Returns True, which the other ranks wait for.
    """
    if found:
        context.files.record_reuse(found[0])
        return True
    claim_stage(context.files, context.stage.attempt)
    write_atomic(context.files.output / CONFIG_FILE, encode(context.stage))
    return True
