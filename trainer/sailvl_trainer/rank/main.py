"""The main of one rank, started by the worker's agent: carries the stage out and ends with a code that says why."""

from __future__ import annotations

import importlib
import logging
import os
import random
import time
import traceback
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from sailvl_trainer.contract import CONFIG_FILE, ExitCode, Result, Termination
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.context import Context, build_context
from sailvl_trainer.rank.distributed import broadcast_object
from sailvl_trainer.rank.exceptions import build_termination
from sailvl_trainer.rank.scratch import Scratch
from sailvl_trainer.rank.settings import Settings, read_settings
from sailvl_trainer.rank.termination import exit_rank
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode, read_stage
from sailvl_trainer.storage.errors import translate_storage_errors
from sailvl_trainer.storage.lineage import check_not_superseded, claim_stage

MODULES = {"curate": "curate", "pretrain": "train", "sft": "train", "evaluate": "evaluate"}

logger = logging.getLogger(__name__)


def main() -> NoReturn:
    """One rank from its environment to its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        run_stage(read_settings(os.environ), rank=rank, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    except BaseException as error:  # noqa: BLE001  # whatever it is, the worker has to say it
        traceback.print_exc()
        exit_rank(build_termination(error, rank))
    exit_rank(Termination(exit_code=ExitCode.OK, rank=rank))


def run_stage(settings: Settings, *, rank: int, local_rank: int) -> Result:
    """Carry the stage out on this rank, unless its result is there; the first rank writes it."""
    started = time.time()
    stage = read_stage(settings.stage_file)
    device = choose_device(settings, local_rank)
    seed_everything(stage.seed)
    context = build_context(stage, device=device, rank=rank, local_rank=local_rank, scratch=Scratch(settings.scratch))
    found = broadcast_object([_open(context)] if context.is_first else None)[0]
    if found is not None:
        logger.info("the result is there already, in %s", found.output)
        return found
    module = importlib.import_module(f"sailvl_trainer.{MODULES[stage.kind]}.stage")
    with translate_storage_errors(context.files.output, root=context.files.output):
        result: Result = module.run(context)
        _finish(context, result)
    logger.info("%s %s done in %.1f s", stage.kind, stage.stage, time.time() - started)
    return result


def seed_everything(seed: int) -> None:
    """The same on every rank: what has to differ by rank draws from a generator of its own."""
    random.seed(seed)
    np.random.seed(seed)  # libraries draw from the global generator
    torch.manual_seed(seed)


def choose_device(settings: Settings, local_rank: int) -> torch.device:
    """A GPU a rank, by its place on the machine. Raises ConfigError without one."""
    if settings.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is imported
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"rank {local_rank} of this worker has no GPU: torch sees {count} for {settings.processes_per_node} "
            "processes; lower workers.gpusPerNode, or use nodes whose driver fits the image"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _open(context: Context) -> Result | None:
    """The stage's result, or None once the stage is this attempt's to carry out; by the first rank.

    A restart in place finds what it had written before a neighbour failed.
    """
    found = context.files.find_result()
    if found is None:
        claim_stage(context.files, context.stage.attempt)
        write_atomic(context.files.output / CONFIG_FILE, encode(context.stage))
    return found


def _finish(context: Context, result: Result) -> None:
    if context.is_first:
        check_not_superseded(context.files, context.stage.attempt)
        context.files.write_result(result)
    context.telemetry.update(phase="finished", metrics=result.metrics)
    dist.barrier()


if __name__ == "__main__":
    main()
