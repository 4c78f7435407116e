"""The settings of a worker, and the paths in its scratch directory; used by the worker and by each of its ranks.

Each process reads the settings from its environment (`contract.Env`) once. The worker and its ranks exchange files in
the scratch directory, which is lost with the worker.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sailvl_trainer.contract import METRICS_PORT, RENDEZVOUS_PORT, Env
from sailvl_trainer.errors import ConfigError

TERMINATION_LOG = Path("/dev/termination-log")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of a worker; `contract.Env` documents the variable behind each field."""

    stage_file: Path
    """Path of the stage config."""
    nodes: int = 1
    """Number of workers of the attempt."""
    node_rank: int = 0
    """Index of this worker, less than `nodes`."""
    node_name: str = ""
    """Name of the machine."""
    processes_per_node: int = 1
    """Number of ranks per worker."""
    device: Literal["cuda", "cpu"] = "cpu"
    """Device that ranks use."""
    rendezvous_host: str = "localhost"
    """Host name or address of the worker of index 0."""
    rendezvous_port: int = RENDEZVOUS_PORT
    """Port of the rendezvous store."""
    rendezvous_secret: str = ""
    """Prefix of the keys of the rendezvous store; empty for a single worker."""
    pod_ip: str = ""
    """Address of this worker's pod, on which the rendezvous store listens."""
    metrics_port: int = METRICS_PORT
    """Port of this worker's HTTP server; it includes the offset."""
    in_place_restarts: int = 0
    """How often the ranks may be restarted within the attempt."""
    grace_seconds: int = 30
    """Seconds between SIGTERM and the worker's exit."""
    stall_timeout_seconds: int = 0
    """Seconds without a heartbeat after which the worker exits; 0: never."""
    termination_log: Path = TERMINATION_LOG
    """Path of the termination message."""
    scratch: Path = Path("/tmp/sailvl")  # in the container's file system, deleted with the container
    """Directory of this worker alone, lost with it."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Paths below the scratch directory."""

    root: Path

    @property
    def stop_file(self) -> Path:
        """File whose existence asks the ranks to save a checkpoint and stop."""
        return self.root / "stop"

    @property
    def progress_file(self) -> Path:
        """Progress document of the worker's lowest rank, which the worker serves; it is also the rank's heartbeat."""
        return self.root / "progress.json"

    def progress_path(self, local_rank: int) -> Path:
        """Return the path of a rank's progress document."""
        return self.progress_file if local_rank == 0 else self.root / f"progress-{local_rank}.json"

    @property
    def metrics_dir(self) -> Path:
        """Directory of prometheus_client's multiprocess files."""
        return self.root / "metrics"

    def store_path(self, start: int) -> Path:
        """Return the path of the file in which the ranks of a single worker meet, at their n-th start."""
        return self.root / f"store-{start}"

    @property
    def elastic_dir(self) -> Path:
        """Directory in which torch's elastic agent keeps the error files of the ranks."""
        return self.root / "elastic"

    @property
    def stacks_dir(self) -> Path:
        """Directory of the stacks that ranks write, as <pid>.txt, on a signal."""
        return self.root / "stacks"

    def prepare(self) -> None:
        """Create the directory and remove what an earlier worker left in it."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.stop_file.unlink(missing_ok=True)
        for path in (*self.root.glob("progress*.json"), *self.root.glob("store-*")):
            path.unlink()
        for folder in (self.metrics_dir, self.elastic_dir, self.stacks_dir):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Parse the environment. Raises ConfigError with the variable, its value and what to set instead."""
    if not environment.get(Env.STAGE_FILE):
        raise ConfigError(f"{Env.STAGE_FILE} is not set; set it to the path of the stage document")
    base = Settings(stage_file=Path(environment[Env.STAGE_FILE]))
    nodes = _parse_number(environment, Env.NODES, base.nodes, minimum=1)
    secret = environment.get(Env.RENDEZVOUS_SECRET, base.rendezvous_secret)
    if nodes > 1 and not secret:
        raise ConfigError(
            f"{Env.RENDEZVOUS_SECRET} is not set; set it to the same random text for all {nodes} workers of the attempt"
        )
    offset = _parse_number(environment, Env.METRICS_PORT_OFFSET, 0)
    return Settings(
        stage_file=base.stage_file,
        nodes=nodes,
        node_rank=_parse_number(environment, Env.NODE_RANK, base.node_rank, maximum=nodes - 1),
        node_name=environment.get(Env.NODE_NAME, base.node_name),
        processes_per_node=_parse_number(environment, Env.PROCESSES_PER_NODE, base.processes_per_node, minimum=1),
        device=_parse_device(environment),
        rendezvous_host=environment.get(Env.RENDEZVOUS_HOST, base.rendezvous_host),
        rendezvous_port=_parse_number(environment, Env.RENDEZVOUS_PORT, base.rendezvous_port, minimum=1, maximum=65535),
        rendezvous_secret=secret,
        pod_ip=environment.get(Env.POD_IP, base.pod_ip),
        metrics_port=_parse_number(environment, Env.METRICS_PORT, base.metrics_port, maximum=65535) + offset,
        in_place_restarts=_parse_number(environment, Env.IN_PLACE_RESTARTS, base.in_place_restarts),
        grace_seconds=_parse_number(environment, Env.GRACE_SECONDS, base.grace_seconds),
        stall_timeout_seconds=_parse_number(environment, Env.STALL_TIMEOUT_SECONDS, base.stall_timeout_seconds),
        termination_log=read_termination_log(environment),
        scratch=Path(environment.get(Env.SCRATCH, base.scratch)),
    )


def read_termination_log(environment: Mapping[str, str]) -> Path:
    """Return the path of the termination message, which is needed to report that other variables are invalid."""
    return Path(environment.get(Env.TERMINATION_LOG, TERMINATION_LOG))


def _parse_number(
    environment: Mapping[str, str], name: Env, default: int, *, minimum: int = 0, maximum: int | None = None
) -> int:
    text = environment.get(name, "")
    try:
        number = int(text) if text else default
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; set a whole number") from None
    if number < minimum or (maximum is not None and number > maximum):
        wanted = f"at least {minimum}" if maximum is None else f"a number from {minimum} to {maximum}"
        raise ConfigError(f"{name} is {number}; set {wanted}")
    return number


def _parse_device(environment: Mapping[str, str]) -> Literal["cuda", "cpu"]:
    device = environment.get(Env.DEVICE) or "cpu"
    if device == "cuda":
        return "cuda"
    if device == "cpu":
        return "cpu"
    raise ConfigError(f"{Env.DEVICE} is {device!r}; set cuda or cpu")
