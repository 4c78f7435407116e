"""The worker's environment, read once into a frozen type; everything but the stage file has a default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.contract import METRICS_PORT, RENDEZVOUS_PORT, Env
from sailvl_trainer.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """See contract.Env for the meaning of each field."""

    stage_file: Path
    nodes: int = 1
    node_rank: int = 0
    node_name: str = ""
    processes_per_node: int = 1
    device: str = "cpu"
    rendezvous_host: str = "localhost"
    rendezvous_port: int = RENDEZVOUS_PORT
    metrics_port: int = METRICS_PORT
    in_place_restarts: int = 0
    grace_seconds: int = 30
    stall_seconds: int = 0
    termination_log: Path = Path("/dev/termination-log")
    scratch: Path = Path("/tmp/sailvl")  # lost with the container, as it should be


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Raises ConfigError that names the variable and what it held."""
    if Env.STAGE_FILE not in environment:
        raise ConfigError(f"{Env.STAGE_FILE} is not set; it has to name the stage document")
    base = Settings(stage_file=Path(environment[Env.STAGE_FILE]))
    return Settings(
        stage_file=base.stage_file,
        nodes=_number(environment, Env.NODES, base.nodes),
        node_rank=_number(environment, Env.NODE_RANK, base.node_rank),
        node_name=environment.get(Env.NODE_NAME, base.node_name),
        processes_per_node=_number(environment, Env.PROCESSES_PER_NODE, base.processes_per_node),
        device=environment.get(Env.DEVICE, base.device),
        rendezvous_host=environment.get(Env.RENDEZVOUS_HOST, base.rendezvous_host),
        rendezvous_port=_number(environment, Env.RENDEZVOUS_PORT, base.rendezvous_port),
        metrics_port=_number(environment, Env.METRICS_PORT, base.metrics_port)
        + _number(environment, Env.METRICS_PORT_OFFSET, 0),
        in_place_restarts=_number(environment, Env.IN_PLACE_RESTARTS, base.in_place_restarts),
        grace_seconds=_number(environment, Env.GRACE_SECONDS, base.grace_seconds),
        stall_seconds=_number(environment, Env.STALL_SECONDS, base.stall_seconds),
        termination_log=Path(environment.get(Env.TERMINATION_LOG, base.termination_log)),
        scratch=Path(environment.get(Env.SCRATCH, base.scratch)),
    )


def _number(environment: Mapping[str, str], name: Env, default: int) -> int:
    text = environment.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; write a whole number") from None
