"""The operator's settings, read once from flags and environment by `cli/operator.py` and handed down from there.

Every option is one row of OPTIONS: its flag, the field it fills, and by the same words its variable
(--metrics-port is SAILVL_OPERATOR_METRICS_PORT). Flags win over variables, variables over defaults.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from sailvl_operator.api.defaults import Defaults
from sailvl_operator.errors import SettingsError

ENVIRONMENT_PREFIX = "SAILVL_OPERATOR_"
PROGRESS_WRITES = 10.0
"""Writes a second, over all runs, for the sake of progress alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiSettings:
    """How the API server is reached."""

    kubeconfig: str = ""
    """Path of a kubeconfig. Default: $KUBECONFIG, the service account of the pod, or ~/.kube/config."""
    context: str = ""
    """Context of the kubeconfig. Default: its current one."""
    namespaces: tuple[str, ...] = ()
    """Namespaces to serve. Default: all."""
    connections: int = 64
    """Connections to the API server at once."""
    request_timeout: float = 30.0
    """Seconds for one request, watches excepted."""
    tries: int = 4
    """Tries of a request that fails for a passing reason."""
    backoff: float = 0.2
    """Seconds before the second try; doubled by each further one, with jitter."""
    page_size: int = 500
    """Objects a page of a list."""
    watch_timeout: int = 300
    """Seconds after which the server ends a watch, to be resumed."""
    events: bool = True
    """Whether Kubernetes events are written."""
    resync: float = 60.0
    """Seconds between looks whether the watch of runs has missed a change; 0: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueSettings:
    """The work queue."""

    workers: int = 16
    """Runs reconciled at once."""
    backoff: float = 0.5
    """Seconds before a run whose reconcile failed is tried again; doubled each time, with jitter."""
    backoff_limit: float = 60.0
    """The longest such wait, in seconds."""
    batch: float = 0.2
    """Seconds for which changes of a run's Jobs and pods are gathered before it is looked at; they come in groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressSettings:
    """Reading /progress from running attempts."""

    interval: float = 5.0
    """Seconds between rounds; 0: never."""
    timeout: float = 2.0
    """Seconds for one request."""
    concurrency: int = 32
    """Requests at once."""
    rate: float = PROGRESS_WRITES
    """Requests a second at most, as many as progress is written: with more runs than that allows, each is read less
    often."""
    patience: float = 60.0
    """Longest pause, in seconds, before a worker that doesn't answer is asked again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiagnosticsSettings:
    """Reading why attempts don't start: events of their Jobs and pods, and Kueue's workloads."""

    interval: float = 5.0
    """Seconds between rounds; 0: never."""
    patience: float = 10.0
    """Seconds for which an attempt may be starting before anybody is asked."""
    reads: int = 8
    """Attempts asked about a round, those first that waited longest for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseSettings:
    """Which of several replicas leads."""

    enabled: bool = True
    """false: this process is the only one."""
    name: str = "sailvl-operator"
    """Of the Lease."""
    namespace: str = "default"
    """Of the Lease; the chart sets the operator's own."""
    identity: str = field(default_factory=socket.gethostname)
    """Who holds it. Default: the host's name, which is the pod's."""
    duration: float = 15.0
    """Seconds without a renewal after which another replica takes over."""
    renew_interval: float = 3.0
    """Seconds between renewals."""
    renew_deadline: float = 10.0
    """Seconds of failed renewals after which the holder gives up; less than the duration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthServerSettings:
    """The operator's own HTTP server: /metrics, /healthz, /readyz."""

    host: str = "0.0.0.0"  # a pod's probes and scrapes come from outside
    port: int = 8080
    """0: any free port."""
    stale_watch: float = 420.0
    """Seconds without a sign of life of a watch after which /healthz fails; more than the watch timeout."""
    stale_runs: float = 300.0
    """Seconds for which the watch of runs may miss changes before /healthz fails."""
    stale_queue: float = 300.0
    """Seconds that the oldest key may wait before /healthz fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All of the above, and what the runs fall back on."""

    api: ApiSettings = ApiSettings()
    queue: QueueSettings = QueueSettings()
    progress: ProgressSettings = ProgressSettings()
    complaints: DiagnosticsSettings = DiagnosticsSettings()
    lease: LeaseSettings = field(default_factory=LeaseSettings)
    server: HealthServerSettings = HealthServerSettings()
    defaults: Defaults = field(default_factory=Defaults)
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    log_format: str = "json"
    """json or text."""

    def __post_init__(self) -> None:
        if self.lease.renew_deadline >= self.lease.duration:
            raise SettingsError(
                f"the lease's renew deadline is {self.lease.renew_deadline} s; set it below the duration of "
                f"{self.lease.duration} s, or two replicas lead at once"
            )
        if self.server.stale_watch <= self.api.watch_timeout:
            raise SettingsError(
                f"a watch counts as stale after {self.server.stale_watch} s; set that above the watch timeout of "
                f"{self.api.watch_timeout} s"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One flag, one variable, one field."""

    flag: str
    target: str
    """group.field, or a field of Settings itself."""
    help: str

    @property
    def variable(self) -> str:
        """The environment variable of the same meaning."""
        return ENVIRONMENT_PREFIX + self.flag.removeprefix("--").replace("-", "_").upper()


OPTIONS = (
    Option(
        flag="--kubeconfig", target="api.kubeconfig", help="path of the kubeconfig; only needed outside of a cluster"
    ),
    Option(flag="--context", target="api.context", help="context of the kubeconfig; defaults to the current context"),
    Option(flag="--namespaces", target="api.namespaces", help="comma-separated namespaces to watch; defaults to all"),
    Option(flag="--events", target="api.events", help="whether to write Kubernetes Events"),
    Option(flag="--workers", target="queue.workers", help="number of runs that are reconciled concurrently"),
    Option(
        flag="--progress-interval",
        target="progress.interval",
        help="seconds between requests to /progress of running attempts; 0 disables them",
    ),
    Option(
        flag="--diagnostics-interval",
        target="complaints.interval",
        help="seconds between reads of Events and Workloads of attempts that do not start; 0 disables them",
    ),
    Option(
        flag="--leader-election",
        target="lease.enabled",
        help="whether to acquire a Lease before reconciling; required with more than one replica",
    ),
    Option(flag="--lease-name", target="lease.name", help="name of the Lease"),
    Option(flag="--lease-namespace", target="lease.namespace", help="namespace of the Lease"),
    Option(flag="--identity", target="lease.identity", help="identity of this replica in the Lease"),
    Option(
        flag="--lease-duration",
        target="lease.duration",
        help="seconds without a renewal after which another replica becomes the leader",
    ),
    Option(flag="--lease-renew-interval", target="lease.renew_interval", help="seconds between renewals of the Lease"),
    Option(
        flag="--lease-renew-deadline",
        target="lease.renew_deadline",
        help="seconds of failed renewals after which the leader exits; must be less than the duration",
    ),
    Option(flag="--metrics-host", target="server.host", help="address of /metrics, /healthz and /readyz"),
    Option(flag="--metrics-port", target="server.port", help="port of /metrics, /healthz and /readyz"),
    Option(
        flag="--trainer-image",
        target="defaults.image",
        help="container image of the trainer for runs that do not set spec.image",
    ),
    Option(
        flag="--grace-seconds", target="defaults.grace_seconds", help="termination grace period of workers in seconds"
    ),
    Option(
        flag="--failure-settle-seconds",
        target="defaults.failure_settle_seconds",
        help="seconds for which evidence of a failure is collected before its cause is decided",
    ),
    Option(
        flag="--backoff-seconds",
        target="defaults.backoff_seconds",
        help="initial backoff in seconds before a restart; doubles with each further restart of the same cause",
    ),
    Option(flag="--backoff-limit-seconds", target="defaults.backoff_limit_seconds", help="maximum backoff in seconds"),
    Option(flag="--log-level", target="log_level", help="log level: DEBUG, INFO, WARNING or ERROR"),
    Option(flag="--log-format", target="log_format", help="log format: json or text"),
)


def read_settings(flags: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """Defaults, then variables, then flags.

    Raises SettingsError on a value that doesn't parse.
    """
    default = Settings()
    changes: dict[str, dict[str, Any]] = {}
    for option in OPTIONS:
        given = getattr(flags, option.flag.removeprefix("--").replace("-", "_"), None)
        text = given if given is not None else environment.get(option.variable)
        if text is not None:
            group, _, name = option.target.rpartition(".")
            owner = getattr(default, group) if group else default
            changes.setdefault(group, {})[name] = _parse(option, text, getattr(owner, name))
    groups = {group: replace(getattr(default, group), **values) for group, values in changes.items() if group}
    return replace(default, **groups, **changes.get("", {}))


def describe(settings: Settings) -> dict[str, Any]:
    """Every setting by group, for the log's first line."""
    return {
        f.name: describe(value) if is_dataclass(value) else value  # type: ignore[arg-type]
        for f in fields(settings)
        for value in (getattr(settings, f.name),)
    }


def _parse(option: Option, text: str, default: object) -> object:
    parsers: dict[type, Callable[[str], object]] = {
        bool: _parse_bool,
        int: int,
        float: float,
        tuple: _parse_list,
        str: str,
    }
    try:
        return parsers[type(default)](text)
    except ValueError as error:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise SettingsError(f"{option.flag} ({option.variable}) is {text!r}; give {kind}") from error


def _parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _parse_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
