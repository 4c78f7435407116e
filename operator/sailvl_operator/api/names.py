"""Every name, label and annotation that the operator writes; composed here and nowhere else."""

from __future__ import annotations

GROUP = "sailvl.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "SailVLRun"
PLURAL = "sailvlruns"
FIELD_MANAGER = "sailvl-operator"

LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_RUN = f"{GROUP}/run"
LABEL_RUN_UID = f"{GROUP}/run-uid"
"""Of pods, whose owner is the Job: it may be gone, and a later run may have its name."""
LABEL_STAGE = f"{GROUP}/stage"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_DIGEST = f"{GROUP}/digest"
"""The first DIGEST_LETTERS of the stage's digest."""
DIGEST_LETTERS = 12
LABEL_SUSPENDED = f"{GROUP}/suspended"
"""Of a Job that was suspended with its run: another's suspension is another's to take back."""
LABEL_KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_KUEUE_JOB = "kueue.x-k8s.io/job-uid"
LABEL_JOB_NAME = "batch.kubernetes.io/job-name"
LABEL_COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"

ANNOTATION_STAGE = f"{GROUP}/stage.json"
"""The stage document, mounted into the worker by the downward API."""
ANNOTATION_RESTART = f"{GROUP}/restart-stage"
"""People's: the name of a stage to start again; taken off once it was."""

MANAGED_SELECTOR = f"{LABEL_MANAGED_BY}={FIELD_MANAGER}"

CONTAINER = "worker"
GPU = "nvidia.com/gpu"
"""The resource."""
METRICS_PORT_NAME = "metrics"
STORAGE_MOUNT = "/data"
STAGE_MOUNT = "/etc/sailvl"

MAX_RUN_AND_STAGE = 52
"""len(run) + len(stage), so that <run>-<stage>-<attempt>-<index> fits in the 63 characters of a label."""


def job_name(run: str, stage: str, attempt: int) -> str:
    """The Job of one attempt."""
    return f"{run}-{stage}-{attempt}"


def service_name(run: str) -> str:
    """The headless Service that gives a run's pods their DNS names."""
    return run


def pod_host(job: str, index: int, service: str) -> str:
    """DNS name of the pod with a completion index, resolvable inside the namespace."""
    return f"{job}-{index}.{service}"


def claim_name(run: str) -> str:
    """The PersistentVolumeClaim made from spec.storage.volumeClaimTemplate."""
    return f"{run}-storage"


NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""Of runs and stages: what a DNS label may be, beginning with a letter."""
