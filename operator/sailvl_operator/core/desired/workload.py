"""Attempt → torchx AppDef: one description from which the cluster's manifests and local processes both come."""

from __future__ import annotations

import msgspec
from torchx.specs import AppDef, Resource, Role, VolumeMount

from sailvl_operator.api import names
from sailvl_operator.api.types import Workers
from sailvl_operator.core.decision import Attempt
from sailvl_trainer.contract import METRICS_PORT, RENDEZVOUS_PORT, Env, Stage

ENTRYPOINT = "python"
ARGS = ("-m", "sailvl_trainer")


def build_appdef(attempt: Attempt) -> AppDef:
    """One role of `nodes` workers, each the elastic agent of its machine."""
    document, nodes = attempt.document, count_nodes(attempt.workers)
    return AppDef(
        name=names.job_name(document.run, document.stage, document.attempt),
        roles=[
            Role(
                name=names.CONTAINER,
                image=attempt.image,
                entrypoint=ENTRYPOINT,
                args=list(ARGS),
                env=build_env(attempt),
                num_replicas=nodes,
                resource=Resource(cpu=-1, gpu=count_gpus(attempt.workers), memMB=-1),
                port_map={names.METRICS_PORT_NAME: METRICS_PORT},
                mounts=[VolumeMount(src=attempt.claim, dst_path=names.STORAGE_MOUNT)],
            )
        ],
    )


def build_env(attempt: Attempt) -> dict[str, str]:
    """What every worker is told, but for what it takes for granted: each variable is a cost to the API server in every
    change of every pod. Its index and machine come from where it runs."""
    gpus = count_gpus(attempt.workers)
    env: dict[str, str] = {
        Env.STAGE_FILE: f"{names.STAGE_MOUNT}/stage.json",
        Env.NODES: str(count_nodes(attempt.workers)),
        Env.RENDEZVOUS_HOST: _rendezvous_host(attempt),
        Env.IN_PLACE_RESTARTS: str(attempt.in_place_restarts),
        Env.GRACE_SECONDS: str(max(1, attempt.grace_seconds - 5)),
        Env.STALL_TIMEOUT_SECONDS: str(attempt.stall_timeout_seconds),
    }
    if gpus:
        env |= {Env.PROCESSES_PER_NODE: str(gpus), Env.DEVICE: "cuda"}
    return env


def build_defaults() -> dict[str, str]:
    """What workers take for granted in a pod, spelt out."""
    return {
        Env.PROCESSES_PER_NODE: "1",
        Env.DEVICE: "cpu",
        Env.RENDEZVOUS_PORT: str(RENDEZVOUS_PORT),
        Env.METRICS_PORT: str(METRICS_PORT),
        Env.METRICS_PORT_OFFSET: "0",
        Env.TERMINATION_LOG: "/dev/termination-log",
        Env.SCRATCH: "/tmp/sailvl",
    }


def _rendezvous_host(attempt: Attempt) -> str:
    """The first worker, by the run's Service; one alone needs none."""
    document = attempt.document
    if count_nodes(attempt.workers) == 1:
        return "localhost"
    job = names.job_name(document.run, document.stage, document.attempt)
    return names.pod_host(job, 0, names.service_name(document.run))


def encode_document(document: Stage) -> str:
    """The stage document as the JSON that the worker reads."""
    return msgspec.json.encode(document, order="sorted").decode()


def count_nodes(workers: Workers) -> int:
    """Workers of an attempt, merged with the defaults."""
    assert isinstance(workers.nodes, int), "merge_workers fills it"
    return workers.nodes


def count_gpus(workers: Workers) -> int:
    """GPUs a worker; 0 on the CPU."""
    assert isinstance(workers.gpus_per_node, int), "merge_workers fills it"
    return workers.gpus_per_node
