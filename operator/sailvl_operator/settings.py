"""Settings of the operator, which `options.py` reads once from flags and environment variables.

Limits that never need to be changed are constants of the modules that use them.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from sailvl_operator.api.allow_lists import ALLOW_ALL, AllowLists
from sailvl_operator.api.types import Defaults
from sailvl_operator.errors import SettingsError


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiSettings:
    """Access to the API server."""

    kubeconfig: str = ""
    """Path of a kubeconfig. Only needed outside of a cluster. Defaults to $KUBECONFIG, the pod's service account or
    ~/.kube/config, in this order."""
    context: str = ""
    """Context of the kubeconfig. Defaults to its current context."""
    namespaces: tuple[str, ...] = ()
    """Namespaces to watch. If empty, the default, all namespaces are watched, which requires a ClusterRole."""
    events: bool = True
    """Whether to write Kubernetes Events on runs. Disable it to save API requests; the status shows the same. Defaults
    to true."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSettings:
    """Work of the leading replica."""

    workers: int = 16
    """Number of runs that are reconciled concurrently. Raise it if keys wait long in the work queue although the API
    server responds fast. Defaults to 16."""
    progress_interval_seconds: float = 5.0
    """Seconds between requests to /progress of running attempts. 0 disables them: the status then shows neither
    progress nor goodput by activity. Defaults to 5."""
    diagnostics_interval_seconds: float = 5.0
    """Seconds between reads of Events and Workloads of attempts that do not start. 0 disables them: the Stuck condition
    then shows only what Jobs and pods report. Defaults to 5."""
    watch_audit_interval_seconds: float = 60.0
    """Seconds between lists of all runs that find events which the watch missed. 0 disables them: a silent watch then
    goes unnoticed. Raise it if listing the runs is a burden on the API server. Defaults to 60."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseSettings:
    """Leader election."""

    enabled: bool = True
    """Whether to acquire a Lease before reconciling. Disable it only if exactly one process runs. Defaults to true."""
    name: str = "sailvl-operator"
    """Name of the Lease. All replicas of one operator use the same. Defaults to sailvl-operator."""
    namespace: str = "default"
    """Namespace of the Lease. The chart sets the namespace of the release. Defaults to default."""
    identity: str = field(default_factory=socket.gethostname)
    """Identity of this replica in the Lease; unique per replica. Defaults to the host name, which is the pod's name."""
    duration_seconds: float = 15.0
    """Seconds without a renewal after which another replica becomes the leader. Lower it for a faster failover after a
    node failure, at the risk of a needless one when the API server is slow. Defaults to 15."""
    renew_interval_seconds: float = 3.0
    """Seconds between renewals of the Lease. Defaults to 3."""
    renew_deadline_seconds: float = 10.0
    """Seconds of failed renewals after which the leader exits. Must be less than the duration, otherwise two replicas
    may lead at once. Defaults to 10."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthSettings:
    """HTTP server of the operator: /metrics, /healthz and /readyz."""

    host: str = "0.0.0.0"  # kubelet and Prometheus connect from outside of the pod
    """Address to listen on. Defaults to all interfaces."""
    port: int = 8080
    """Port to listen on. 0 chooses a free one. Defaults to 8080."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorSettings:
    """All settings of the operator."""

    api: ApiSettings = ApiSettings()
    controller: ControllerSettings = ControllerSettings()
    lease: LeaseSettings = field(default_factory=LeaseSettings)
    health: HealthSettings = HealthSettings()
    defaults: Defaults = field(default_factory=Defaults)
    """Defaults of runs."""
    allowed: AllowLists = ALLOW_ALL
    """Allow-lists of what runs may name."""
    log_level: str = "INFO"
    """Minimum level of log messages: DEBUG, INFO, WARNING or ERROR. Defaults to INFO."""
    log_format: str = "json"
    """Format of log messages: json, or text for people. Defaults to json."""

    def __post_init__(self) -> None:
        if self.lease.renew_deadline_seconds >= self.lease.duration_seconds:
            raise SettingsError(
                f"--lease-renew-deadline-seconds is {self.lease.renew_deadline_seconds:g}; set it to less than "
                f"--lease-duration-seconds, which is {self.lease.duration_seconds:g}"
            )


def describe(settings: OperatorSettings) -> dict[str, Any]:
    """Return all settings by group, for the first line of the log."""
    return {
        f.name: describe(value) if is_dataclass(value) else value  # type: ignore[arg-type]
        for f in fields(settings)
        for value in (getattr(settings, f.name),)
    }
