"""Names, labels and annotations that the operator writes. They are composed here and nowhere else."""

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
"""Label of pods with the UID of their run: the Job that owns a pod may be deleted, and a later run may reuse the
name."""
LABEL_STAGE = f"{GROUP}/stage"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_DIGEST = f"{GROUP}/digest"
"""Label with the first DIGEST_LETTERS characters of the digest of the stage."""
DIGEST_LETTERS = 12
LABEL_SUSPENDED = f"{GROUP}/suspended"
"""Label of a Job that the operator suspended together with its run. A Job that was suspended externally lacks it and is
not resumed by the operator."""
LABEL_KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_KUEUE_JOB = "kueue.x-k8s.io/job-uid"
LABEL_JOB_NAME = "batch.kubernetes.io/job-name"
LABEL_COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
RESERVED_LABEL_PREFIXES = (f"{GROUP}/", "batch.kubernetes.io/", "kueue.x-k8s.io/")
"""Prefixes of labels by which the operator, the Job controller and Kueue recognise pods; users can't set them."""
RESERVED_LABELS = (LABEL_MANAGED_BY, "job-name", "controller-uid")
"""Labels without such a prefix that users can't set; the last two are the Job controller's old names."""

ANNOTATION_STAGE = f"{GROUP}/stage.json"
"""Annotation with the stage config, which the downward API mounts into the worker."""
ANNOTATION_RESTART = f"{GROUP}/restart-stage"
"""Annotation with the name of a stage to restart. Users set it; the operator removes it after the restart."""

MANAGED_SELECTOR = f"{LABEL_MANAGED_BY}={FIELD_MANAGER}"

CONTAINER = "worker"
GPU = "nvidia.com/gpu"
"""Name of the extended resource for GPUs."""
METRICS_PORT_NAME = "metrics"
STORAGE_MOUNT = "/data"
STAGE_MOUNT = "/etc/sailvl"

MAX_RUN_AND_STAGE = 52
"""Maximum of len(run) + len(stage), so that <run>-<stage>-<attempt>-<index> fits into a label of 63 characters."""


def job_name(run: str, stage: str, attempt: int) -> str:
    """Return the name of the Job of an attempt."""
    return f"{run}-{stage}-{attempt}"


def service_name(run: str) -> str:
    """Return the name of the headless Service that gives the pods of a run their DNS names."""
    return run


def network_policy_name(run: str) -> str:
    """Return the name of the NetworkPolicy that protects the pods of a run."""
    return run


def pod_host(job: str, index: int, service: str) -> str:
    """Return the DNS name, within the namespace, of the pod with a completion index."""
    return f"{job}-{index}.{service}"


def claim_name(run: str) -> str:
    """Return the name of the PersistentVolumeClaim created from spec.storage.volumeClaimTemplate."""
    return f"{run}-storage"


NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""Pattern of the names of runs and stages: a DNS label that begins with a letter."""
