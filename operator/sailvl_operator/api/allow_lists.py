"""Allow-lists of an installation: images, priority classes, taints, service accounts and servers that runs may name.

An empty list allows everything. `core/reconcile.py` refuses a run outside of a list before anything is created for it,
and `sailvl validate` reports the same errors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields

from msgspec import UNSET

from sailvl_operator.api.allow_list_entries import (
    describe_host_error,
    describe_image_error,
    describe_key_error,
    describe_name_error,
    is_image_at,
    is_server_at,
)
from sailvl_operator.api.parse import Problem
from sailvl_operator.api.stages import Curate
from sailvl_operator.api.status import StageStatus
from sailvl_operator.api.types import Spec, Workers

_MAX_SHOWN_ENTRIES = 10
"""Entries of a list that an error message shows."""
_ENTRY_CHECKS: dict[str, Callable[[str], str]] = {
    "images": describe_image_error,
    "priority_classes": describe_name_error,
    "toleration_keys": describe_key_error,
    "service_accounts": describe_name_error,
    "server_hosts": describe_host_error,
}
"""Function that describes an entry which no run can match, by list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AllowLists:
    """Values that a spec may set; an empty list allows everything. An unset field of a spec is always allowed."""

    images: tuple[str, ...] = ()
    """Registries (registry.example.com) and repositories (registry.example.com/team) of spec.image. Each allows what
    lies below it, and has no tag. Defaults to all."""
    priority_classes: tuple[str, ...] = ()
    """Values of workers.priorityClassName. Defaults to all."""
    toleration_keys: tuple[str, ...] = ()
    """Keys of workers.tolerations. A toleration without a key tolerates every taint and is not allowed if the list is
    set. Defaults to all."""
    service_accounts: tuple[str, ...] = ()
    """Values of workers.serviceAccountName. Defaults to all."""
    server_hosts: tuple[str, ...] = ()
    """Hosts of caption.server and judge.server, each with a port (judge.team.svc:8000) or for all ports. Defaults to
    all."""

    def __post_init__(self) -> None:
        for list_ in fields(self):
            for entry in getattr(self, list_.name):
                if error := _ENTRY_CHECKS[list_.name](entry):
                    raise ValueError(f"allow-list of {list_.name.replace('_', ' ')}: {entry!r} {error}")


ALLOW_ALL = AllowLists()
"""Empty lists."""


def find_disallowed_fields(spec: Spec, allowed: AllowLists, stages: Sequence[StageStatus] = ()) -> tuple[Problem, ...]:
    """Return every field of a spec whose value an allow-list doesn't have.

    Those of `stages` that have succeeded are not checked, because they start no more workers.
    """
    if allowed == ALLOW_ALL:
        return ()
    completed = {stage.name for stage in stages if stage.state == "Succeeded"}
    return tuple(_check_spec(spec, allowed, completed))


def _check_spec(spec: Spec, allowed: AllowLists, completed: Collection[str]) -> Iterator[Problem]:
    if (
        spec.image is not UNSET
        and allowed.images
        and not any(is_image_at(spec.image, entry) for entry in allowed.images)
    ):
        yield "spec.image", _describe(spec.image, allowed.images)
    yield from _check_workers("spec.workers", spec.workers, allowed)
    for index, stage in enumerate(spec.stages):
        if stage.name in completed:
            continue
        yield from _check_workers(f"spec.stages[{index}].workers", stage.workers, allowed)
        if stage.curate is not UNSET and allowed.server_hosts:
            yield from _check_servers(f"spec.stages[{index}].curate", stage.curate, allowed.server_hosts)


def _check_workers(path: str, workers: Workers, allowed: AllowLists) -> Iterator[Problem]:
    named = (
        ("priorityClassName", workers.priority_class_name, allowed.priority_classes),
        ("serviceAccountName", workers.service_account_name, allowed.service_accounts),
    )
    for field, value, entries in named:
        if value is not UNSET and entries and value not in entries:
            yield f"{path}.{field}", _describe(value, entries)
    keys = allowed.toleration_keys
    tolerations = () if workers.tolerations is UNSET or not keys else workers.tolerations
    for index, toleration in enumerate(tolerations):
        key = "" if toleration.key is UNSET else toleration.key
        if key not in keys:
            yield f"{path}.tolerations[{index}].key", _describe(key or "a toleration of every taint", keys)


def _check_servers(path: str, curate: Curate, hosts: tuple[str, ...]) -> Iterator[Problem]:
    servers = [("caption.server", curate.caption.server)]
    servers += [] if curate.judge is UNSET else [("judge.server", curate.judge.server)]
    for field, url in servers:
        if url is not UNSET and not any(is_server_at(url, entry) for entry in hosts):
            yield f"{path}.{field}", _describe(url, hosts)


def _describe(value: str, entries: tuple[str, ...]) -> str:
    more = "" if len(entries) <= _MAX_SHOWN_ENTRIES else f" and {len(entries) - _MAX_SHOWN_ENTRIES} more"
    return f"{value} is not allowed by the operator; it allows {', '.join(entries[:_MAX_SHOWN_ENTRIES])}{more}"
