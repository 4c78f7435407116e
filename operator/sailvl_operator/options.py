"""Options of the operator: reads the settings from flags and environment variables.

Each setting is one row of OPTIONS: its flag, the field that it sets, and the value of the chart. The environment
variable follows from the flag (--metrics-port is SAILVL_OPERATOR_METRICS_PORT). Flags take precedence over variables.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sailvl_operator.api.allow_lists import AllowLists
from sailvl_operator.api.network_peers import parse_peers
from sailvl_operator.errors import SettingsError
from sailvl_operator.settings import OperatorSettings

ENVIRONMENT_PREFIX = "SAILVL_OPERATOR_"

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number of at least 0",
    float: "a number of at least 0",
    tuple: "comma-separated entries, or leave it out",
}
"""Values that a setting of a type may have, as error messages name them."""
_MAX_QUOTED_LENGTH = 200
"""Letters of a setting's text that an error message shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One setting: its flag, its environment variable and its field."""

    flag: str
    target: str
    """Field that the option sets: group.field, or a field of OperatorSettings."""
    help: str
    value: str = ""
    """Path of the chart's value; empty if the chart derives the setting, or leaves it at its default."""
    parse: Callable[[str], Any] | None = None
    """Function that parses the text, and raises ValueError with what to set. Defaults to one for the field's type."""

    @property
    def variable(self) -> str:
        """Environment variable that sets the same field."""
        return ENVIRONMENT_PREFIX + self.flag.removeprefix("--").replace("-", "_").upper()


OPTIONS = (
    Option(
        flag="--kubeconfig", target="api.kubeconfig", help="path of the kubeconfig; only needed outside of a cluster"
    ),
    Option(flag="--context", target="api.context", help="context of the kubeconfig; defaults to the current context"),
    Option(
        flag="--namespaces",
        target="api.namespaces",
        help="comma-separated namespaces to watch; defaults to all",
        value="watchNamespaces",
    ),
    Option(flag="--events", target="api.events", help="whether to write Kubernetes Events", value="operator.events"),
    Option(
        flag="--workers",
        target="controller.workers",
        help="number of runs that are reconciled concurrently",
        value="operator.workers",
    ),
    Option(
        flag="--progress-interval-seconds",
        target="controller.progress_interval_seconds",
        help="seconds between requests to /progress of running attempts; 0 disables them",
        value="operator.progressIntervalSeconds",
    ),
    Option(
        flag="--diagnostics-interval-seconds",
        target="controller.diagnostics_interval_seconds",
        help="seconds between reads of Events and Workloads of attempts that do not start; 0 disables them",
        value="operator.diagnosticsIntervalSeconds",
    ),
    Option(
        flag="--watch-audit-interval-seconds",
        target="controller.watch_audit_interval_seconds",
        help="seconds between lists of all runs that find events which the watch missed; 0 disables them",
        value="operator.watchAuditIntervalSeconds",
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
        flag="--lease-duration-seconds",
        target="lease.duration_seconds",
        help="seconds without a renewal after which another replica becomes the leader",
        value="leaderElection.durationSeconds",
    ),
    Option(
        flag="--lease-renew-interval-seconds",
        target="lease.renew_interval_seconds",
        help="seconds between renewals of the Lease",
        value="leaderElection.renewIntervalSeconds",
    ),
    Option(
        flag="--lease-renew-deadline-seconds",
        target="lease.renew_deadline_seconds",
        help="seconds of failed renewals after which the leader exits; must be less than the duration",
        value="leaderElection.renewDeadlineSeconds",
    ),
    Option(flag="--metrics-host", target="health.host", help="address of /metrics, /healthz and /readyz"),
    Option(flag="--metrics-port", target="health.port", help="port of /metrics, /healthz and /readyz"),
    Option(
        flag="--trainer-image",
        target="defaults.image",
        help="container image of the trainer for runs that do not set spec.image",
        value="runs.trainerImage",
    ),
    Option(
        flag="--network-policies",
        target="defaults.network_policies",
        help="whether runs get a NetworkPolicy, unless their spec disables it",
        value="networkPolicy.runs",
    ),
    Option(
        flag="--metrics-peers",
        target="defaults.metrics_peers",
        help="NetworkPolicyPeers that may connect to the metrics port of workers, as a JSON list",
        parse=parse_peers,
    ),
    Option(
        flag="--grace-seconds",
        target="defaults.grace_seconds",
        help="termination grace period of workers in seconds",
        value="runs.graceSeconds",
    ),
    Option(
        flag="--failure-settle-seconds",
        target="defaults.failure_settle_seconds",
        help="seconds for which evidence of a failure is collected before its cause is decided",
        value="runs.failureSettleSeconds",
    ),
    Option(
        flag="--backoff-seconds",
        target="defaults.backoff_seconds",
        help="initial backoff in seconds before a restart; doubles with each further restart of the same cause",
        value="runs.backoffSeconds",
    ),
    Option(
        flag="--backoff-limit-seconds",
        target="defaults.backoff_limit_seconds",
        help="maximum backoff in seconds",
        value="runs.backoffLimitSeconds",
    ),
    Option(
        flag="--allowed-images",
        target="allowed.images",
        help="comma-separated registries and repositories that spec.image may be from; defaults to all",
        value="allowed.images",
    ),
    Option(
        flag="--allowed-priority-classes",
        target="allowed.priority_classes",
        help="comma-separated priority classes that workers may have; defaults to all",
        value="allowed.priorityClasses",
    ),
    Option(
        flag="--allowed-toleration-keys",
        target="allowed.toleration_keys",
        help="comma-separated keys of taints that workers may tolerate; defaults to all",
        value="allowed.tolerationKeys",
    ),
    Option(
        flag="--allowed-service-accounts",
        target="allowed.service_accounts",
        help="comma-separated service accounts that workers may have; defaults to all",
        value="allowed.serviceAccounts",
    ),
    Option(
        flag="--allowed-server-hosts",
        target="allowed.server_hosts",
        help="comma-separated hosts of caption.server and judge.server; defaults to all",
        value="allowed.serverHosts",
    ),
    Option(
        flag="--log-level",
        target="log_level",
        help="log level: DEBUG, INFO, WARNING or ERROR",
        value="operator.logLevel",
    ),
    Option(flag="--log-format", target="log_format", help="log format: json or text", value="operator.logFormat"),
)


_ALLOW_LIST_OPTIONS = tuple(option for option in OPTIONS if option.target.startswith("allowed."))


def read_settings(
    flags: argparse.Namespace, environment: Mapping[str, str], *, options: Iterable[Option] = OPTIONS
) -> OperatorSettings:
    """Read the settings: flags take precedence over environment variables, and those over defaults.

    Raises SettingsError if a value is invalid.
    """
    default = OperatorSettings()
    changes: dict[str, dict[str, Any]] = {}
    for option in options:
        text = _get_text(option, flags, environment)
        if text is not None:
            group, _, name = option.target.rpartition(".")
            owner = getattr(default, group) if group else default
            changes.setdefault(group, {})[name] = _parse(option, text, getattr(owner, name))
    try:
        groups = {group: replace(getattr(default, group), **values) for group, values in changes.items() if group}
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return replace(default, **groups, **changes.get("", {}))


def add_allow_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the allow-lists to the parser of a command that checks specs offline."""
    for option in _ALLOW_LIST_OPTIONS:
        parser.add_argument(option.flag, help=option.help, default=None)


def read_allow_lists(flags: argparse.Namespace) -> AllowLists:
    """Read the allow-lists from flags alone. Raises SettingsError if an entry is invalid."""
    return read_settings(flags, {}, options=_ALLOW_LIST_OPTIONS).allowed


def find_empty_allow_lists(flags: argparse.Namespace, environment: Mapping[str, str]) -> list[str]:
    """Return the flags of allow-lists that are set, but to an empty list, which allows everything."""
    texts = ((option.flag, _get_text(option, flags, environment)) for option in _ALLOW_LIST_OPTIONS)
    return [flag for flag, text in texts if text is not None and not text.strip()]


def _get_text(option: Option, flags: argparse.Namespace, environment: Mapping[str, str]) -> str | None:
    """Return the text of an option's flag, else of its variable; None if neither is set."""
    given: str | None = getattr(flags, option.flag.removeprefix("--").replace("-", "_"), None)
    return given if given is not None else environment.get(option.variable)


def _parse(option: Option, text: str, default: object) -> object:
    if option.parse is not None:
        try:
            return option.parse(text)
        except ValueError as error:
            raise SettingsError(f"{_quote(option, text)}; set it to {error}") from error
    parsers: dict[type, Callable[[str], object]] = {
        bool: _parse_bool,
        int: lambda text: _check_number(int(text)),
        float: lambda text: _check_number(float(text)),
        tuple: _parse_list,
        str: str,
    }
    try:
        return parsers[type(default)](text)
    except ValueError as error:
        raise SettingsError(f"{_quote(option, text)}; set it to {_KINDS[type(default)]}") from error


def _quote(option: Option, text: str) -> str:
    """Return the flag, the variable and the text of an option, of which a long one is cut."""
    shown = text if len(text) <= _MAX_QUOTED_LENGTH else f"{text[:_MAX_QUOTED_LENGTH]}…"
    return f"{option.flag} ({option.variable}) is {shown!r}"


def _parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _check_number(value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(value)
    return value


def _parse_list(text: str) -> tuple[str, ...]:
    """Split a comma-separated list. Raises ValueError if it has commas, but no entry between them."""
    entries = tuple(part.strip() for part in text.split(",") if part.strip())
    if not entries and text.strip():
        raise ValueError(text)
    return entries
