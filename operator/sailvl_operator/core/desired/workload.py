"""Build the torchx AppDef of an attempt, from which both the Job and the processes of local mode are made."""

from __future__ import annotations

import msgspec
from torchx.specs import AppDef, Resource, Role, VolumeMount

from sailvl_operator.api import names
from sailvl_operator.api.types import Workers
from sailvl_operator.core.decision import AttemptSpec
from sailvl_trainer.contract import METRICS_PORT, RENDEZVOUS_PORT, Env, Stage

ENTRYPOINT = "python"
ARGS = ("-m", "sailvl_trainer")


def build_appdef(attempt: AttemptSpec, *, rendezvous_secret: str) -> AppDef:
    """Build the app with one role, whose replicas are the workers; the secret is random for each Job."""
    document, nodes = attempt.document, count_nodes(attempt.workers)
    return AppDef(
        name=names.job_name(document.run, document.stage, document.attempt),
        roles=[
            Role(
                name=names.CONTAINER,
                image=attempt.image,
                entrypoint=ENTRYPOINT,
                args=list(ARGS),
                env=build_env(attempt, rendezvous_secret),
                num_replicas=nodes,
                resource=Resource(cpu=-1, gpu=count_gpus(attempt.workers), memMB=-1),
                port_map={names.METRICS_PORT_NAME: METRICS_PORT},
                mounts=[VolumeMount(src=attempt.claim, dst_path=names.STORAGE_MOUNT)],
            )
        ],
    )


def build_env(attempt: AttemptSpec, rendezvous_secret: str) -> dict[str, str]:
    """Build the environment of a worker; a single worker has no rendezvous over the network and gets no secret.

    Variables that equal the trainer's defaults are omitted: the API server validates each one again on every update of
    every pod. The worker's index and node are set where it runs.
    """
    gpus = count_gpus(attempt.workers)
    env: dict[str, str] = {
        Env.STAGE_FILE: f"{names.STAGE_MOUNT}/stage.json",
        Env.NODES: str(count_nodes(attempt.workers)),
        Env.RENDEZVOUS_HOST: _rendezvous_host(attempt),
        Env.IN_PLACE_RESTARTS: str(attempt.in_place_restarts),
        Env.GRACE_SECONDS: str(max(1, attempt.grace_seconds - 5)),
        Env.STALL_TIMEOUT_SECONDS: str(attempt.stall_timeout_seconds),
    }
    if count_nodes(attempt.workers) > 1:
        env[Env.RENDEZVOUS_SECRET] = rendezvous_secret
    if gpus:
        env |= {Env.PROCESSES_PER_NODE: str(gpus), Env.DEVICE: "cuda"}
    return env


def build_defaults() -> dict[str, str]:
    """Return the variables that a worker may omit, with the trainer's defaults for a pod."""
    return {
        Env.PROCESSES_PER_NODE: "1",
        Env.DEVICE: "cpu",
        Env.RENDEZVOUS_PORT: str(RENDEZVOUS_PORT),
        Env.RENDEZVOUS_SECRET: "",
        Env.POD_IP: "",
        Env.METRICS_PORT: str(METRICS_PORT),
        Env.METRICS_PORT_OFFSET: "0",
        Env.TERMINATION_LOG: "/dev/termination-log",
        Env.SCRATCH: "/tmp/sailvl",
    }


def _rendezvous_host(attempt: AttemptSpec) -> str:
    """Return the DNS name of the first worker, or localhost if it is the only one and needs no Service."""
    document = attempt.document
    if count_nodes(attempt.workers) == 1:
        return "localhost"
    job = names.job_name(document.run, document.stage, document.attempt)
    return names.pod_host(job, 0, names.service_name(document.run))


def encode_document(document: Stage) -> str:
    """Encode the stage config as the JSON that the worker reads."""
    return msgspec.json.encode(document, order="sorted").decode()


def count_nodes(workers: Workers) -> int:
    """Return the number of workers of an attempt; `workers` is merged with the defaults."""
    assert isinstance(workers.nodes, int), "merge_workers sets it"
    return workers.nodes


def count_gpus(workers: Workers) -> int:
    """Return the number of GPUs of each worker; 0 if it runs on the CPU."""
    assert isinstance(workers.gpus_per_node, int), "merge_workers sets it"
    return workers.gpus_per_node
