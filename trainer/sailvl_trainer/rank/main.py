"""Main module of a rank: runs the stage and exits with a code that says how it ended.

Started by `rank/bootstrap.py`, once per GPU of the worker, with RANK and LOCAL_RANK set by torch's elastic agent. It
calls `run` of `sailvl_trainer.<kind>.stage` with the rank's context.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
import time
import traceback
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from sailvl_trainer.contract import ExitCode, Kind, Result, Termination
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.context import Context, build_context
from sailvl_trainer.rank.exceptions import build_termination
from sailvl_trainer.rank.reused_result import find_result_or_claim
from sailvl_trainer.rank.settings import Scratch, Settings, read_settings
from sailvl_trainer.rank.termination import exit_rank
from sailvl_trainer.storage.codec import read_stage
from sailvl_trainer.storage.files import translate_storage_errors
from sailvl_trainer.storage.lineage import check_not_superseded

STAGE_PACKAGES = {"curate": "curate", "pretrain": "train", "sft": "train", "evaluate": "evaluate"}
"""Package that runs a stage, by its kind."""

logger = logging.getLogger(__name__)


def main() -> NoReturn:
    """Run a rank, from its environment to its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        run_stage(read_settings(os.environ), rank=rank, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    except BaseException as error:  # noqa: BLE001  # the worker reports every error
        traceback.print_exc()
        exit_rank(build_termination(error, rank))
    exit_rank(Termination(exit_code=ExitCode.OK, rank=rank))


def run_stage(settings: Settings, *, rank: int, local_rank: int) -> Result:
    """Run the stage on this rank and return its result, or return an existing result; rank 0 writes the result."""
    started = time.time()
    stage = read_stage(settings.stage_file)
    device = choose_device(settings, local_rank)
    seed_everything(stage.seed)
    context = build_context(
        stage,
        device=device,
        rank=rank,
        local_rank=local_rank,
        scratch=Scratch(settings.scratch),
        processes_per_node=settings.processes_per_node,
    )
    found = find_result_or_claim(context)
    if found is not None:
        logger.info("found an existing result in %s", found.output)
        dist.barrier()  # a rank that exits earlier would look like a lost peer to those that still verify the result
        return found
    module = _import_stage(stage.kind)
    with translate_storage_errors(context.files.output, root=context.files.output):
        result: Result = module.run(context)
        _finish(context, result)
    logger.info("finished stage %s (%s) in %.1f s", stage.stage, stage.kind, time.time() - started)
    return result


def seed_everything(seed: int) -> None:
    """Seed the global generators equally on all ranks; code that differs between ranks has its own generator."""
    random.seed(seed)
    np.random.seed(seed)  # libraries draw from the global generator
    torch.manual_seed(seed)


def choose_device(settings: Settings, local_rank: int) -> torch.device:
    """Return the CPU, or the GPU with the index of the local rank. Raises ConfigError if there is no such GPU."""
    if settings.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is imported
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: torch found {count} for {settings.processes_per_node} ranks; "
            "lower workers.gpusPerNode, or use nodes whose driver supports the image's CUDA version"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _import_stage(kind: Kind) -> Any:
    """Import the module that runs a kind of stage; it takes seconds."""
    return importlib.import_module(f"sailvl_trainer.{STAGE_PACKAGES[kind]}.stage")


def _finish(context: Context, result: Result) -> None:
    """Write the result and wait until every rank has reached the end of the stage."""
    if context.is_first:
        check_not_superseded(context.files, context.stage.attempt)
        context.files.write_result(result)
    context.telemetry.update(phase="finished", metrics=result.metrics)
    dist.barrier()


if __name__ == "__main__":
    main()
