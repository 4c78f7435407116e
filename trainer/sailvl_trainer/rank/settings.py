"""The worker's environment, read once into a frozen type; everything but the stage file has a default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sailvl_trainer.contract import METRICS_PORT, RENDEZVOUS_PORT, Env
from sailvl_trainer.errors import ConfigError

TERMINATION_LOG = Path("/dev/termination-log")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """See contract.Env for the meaning of each field."""

    stage_file: Path
    nodes: int = 1
    node_rank: int = 0
    node_name: str = ""
    processes_per_node: int = 1
    device: Literal["cuda", "cpu"] = "cpu"
    rendezvous_host: str = "localhost"
    rendezvous_port: int = RENDEZVOUS_PORT
    metrics_port: int = METRICS_PORT
    """The offset is added already."""
    in_place_restarts: int = 0
    grace_seconds: int = 30
    stall_timeout_seconds: int = 0
    termination_log: Path = TERMINATION_LOG
    scratch: Path = Path("/tmp/sailvl")  # lost with the container, as it should be


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Raises ConfigError that names the variable, what it held and what to set instead."""
    if not environment.get(Env.STAGE_FILE):
        raise ConfigError(f"{Env.STAGE_FILE} is not set; set it to the path of the stage document")
    base = Settings(stage_file=Path(environment[Env.STAGE_FILE]))
    nodes = _number(environment, Env.NODES, base.nodes, least=1)
    offset = _number(environment, Env.METRICS_PORT_OFFSET, 0)
    return Settings(
        stage_file=base.stage_file,
        nodes=nodes,
        node_rank=_number(environment, Env.NODE_RANK, base.node_rank, most=nodes - 1),
        node_name=environment.get(Env.NODE_NAME, base.node_name),
        processes_per_node=_number(environment, Env.PROCESSES_PER_NODE, base.processes_per_node, least=1),
        device=_device(environment),
        rendezvous_host=environment.get(Env.RENDEZVOUS_HOST, base.rendezvous_host),
        rendezvous_port=_number(environment, Env.RENDEZVOUS_PORT, base.rendezvous_port, least=1, most=65535),
        metrics_port=_number(environment, Env.METRICS_PORT, base.metrics_port, most=65535) + offset,
        in_place_restarts=_number(environment, Env.IN_PLACE_RESTARTS, base.in_place_restarts),
        grace_seconds=_number(environment, Env.GRACE_SECONDS, base.grace_seconds),
        stall_timeout_seconds=_number(environment, Env.STALL_TIMEOUT_SECONDS, base.stall_timeout_seconds),
        termination_log=read_termination_log(environment),
        scratch=Path(environment.get(Env.SCRATCH, base.scratch)),
    )


def read_termination_log(environment: Mapping[str, str]) -> Path:
    """Apart from the rest, since it is needed to say what is wrong with the rest."""
    return Path(environment.get(Env.TERMINATION_LOG, TERMINATION_LOG))


def _number(environment: Mapping[str, str], name: Env, default: int, *, least: int = 0, most: int | None = None) -> int:
    text = environment.get(name, "")
    try:
        number = int(text) if text else default
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; set a whole number") from None
    if number < least or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"a number from {least} to {most}"
        raise ConfigError(f"{name} is {number}; set {wanted}")
    return number


def _device(environment: Mapping[str, str]) -> Literal["cuda", "cpu"]:
    device = environment.get(Env.DEVICE) or "cpu"
    if device == "cuda":
        return "cuda"
    if device == "cpu":
        return "cpu"
    raise ConfigError(f"{Env.DEVICE} is {device!r}; set cuda or cpu")
