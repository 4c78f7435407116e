"""The main of one rank, started by torch's elastic agent: carries the stage out and ends with a code that says why.

A rank ends by os._exit: with a live gloo group an ordinary exit becomes SIGABRT, and the cause is lost.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from sailvl_trainer.contract import CONFIG_FILE, ExitCode, Result, Termination
from sailvl_trainer.runtime.context import Context, build_context
from sailvl_trainer.runtime.documents import encode, read_stage, write_atomic
from sailvl_trainer.runtime.errors import Preempted, TrainerError
from sailvl_trainer.runtime.settings import Settings, read_settings

MODULES = {"curate": "curate", "pretrain": "train", "sft": "train", "evaluate": "evaluate"}
PEER_LOST_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")

logger = logging.getLogger(__name__)


def main() -> NoReturn:
    """One rank from its environment to its exit code."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    settings = read_settings(os.environ)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        run_stage(settings)
    except BaseException as error:  # noqa: BLE001  # whatever it is, the worker has to say it
        traceback.print_exc()
        _end(settings, describe(error, rank))
    _end(settings, Termination(exit_code=ExitCode.OK, rank=rank))


def run_stage(settings: Settings) -> Result:
    """Carry the stage out on this rank; the first rank writes its result."""
    stage = read_stage(settings.stage_file)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    seed_everything(stage.seed)
    context = build_context(
        stage, device=_device(settings, local_rank), local_rank=local_rank, scratch=settings.scratch
    )
    if context.is_first:
        write_atomic(context.files.output / CONFIG_FILE, encode(stage))
    module = importlib.import_module(f"sailvl_trainer.{MODULES[stage.kind]}.stage")
    result: Result = module.run(context)
    _finish(context, result)
    return result


def seed_everything(seed: int) -> None:
    """The same on every rank: what has to differ by rank draws from a generator of its own."""
    random.seed(seed)
    np.random.seed(seed)  # libraries draw from the global generator
    torch.manual_seed(seed)


def describe(error: BaseException, rank: int) -> Termination:
    """What an exception means for the worker."""
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Termination(
        exit_code=_exit_code(error),
        rank=rank,
        message=words,
        traceback="".join(traceback.format_exception(error))[-3000:],
        checkpoint=error.checkpoint if isinstance(error, Preempted) else None,
    )


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TrainerError):
        return error.exit_code
    if isinstance(error, torch.OutOfMemoryError):
        return ExitCode.OUT_OF_MEMORY
    if isinstance(error, dist.DistError) or any(words in str(error) for words in PEER_LOST_WORDS):
        return ExitCode.PEER_LOST
    return 1


def _finish(context: Context, result: Result) -> None:
    if context.is_first:
        context.files.write_result(result)
    context.telemetry.update(phase="finished", metrics=result.metrics)
    dist.barrier()


def _device(settings: Settings, local_rank: int) -> torch.device:
    if settings.device != "cuda":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _end(settings: Settings, termination: Termination) -> NoReturn:
    """Leave the words for the worker's entry, in the form that torch's agent reads, and end at once."""
    code = int(termination.exit_code)
    if code:
        path = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", settings.scratch / "error.json"))
        words = msgspec.json.encode(termination).decode()
        path.write_bytes(msgspec.json.encode({"message": {"message": words, "extraInfo": {"timestamp": "0"}}}))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
