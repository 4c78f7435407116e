"""Allow-lists of an installation: images, priority classes, taints, service accounts and servers that runs may name.

An empty list allows everything. `core/reconcile.py` refuses a run outside of a list before anything is created for it,
and `sailvl validate` reports the same errors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from urllib.parse import SplitResult, urlsplit

from msgspec import UNSET

from sailvl_operator.api.parse import Problem
from sailvl_operator.api.stages import Curate
from sailvl_operator.api.status import StageStatus
from sailvl_operator.api.types import Spec, Workers

_SHOWN_ENTRIES = 10
"""Entries of a list that an error message shows."""
_PORTS = {"http": 80, "https": 443}


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
                if "*" in entry or "://" in entry or any(c.isspace() for c in entry):
                    raise ValueError(
                        f"allow-list of {list_.name.replace('_', ' ')}: {entry!r} has a wildcard, a scheme or a space; "
                        "set it to a plain name, or leave the list empty to allow everything"
                    )


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
    if spec.image is not UNSET and allowed.images and not _is_image_allowed(spec.image, allowed.images):
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
        if url is not UNSET and not any(_is_at_host(urlsplit(url), entry) for entry in hosts):
            yield f"{path}.{field}", _describe(url, hosts)


def _is_image_allowed(image: str, entries: tuple[str, ...]) -> bool:
    repository = _find_repository(image)
    prefixes = map(_complete_entry, entries)
    return any(repository == prefix or repository.startswith(f"{prefix}/") for prefix in prefixes)


def _find_repository(image: str) -> str:
    """Return registry and repository of an image reference, without tag and digest, as container runtimes read it."""
    name = image.partition("@")[0]
    parent, slash, last = name.rpartition("/")
    return _complete_name(f"{parent}{slash}{last.partition(':')[0]}")


def _complete_entry(entry: str) -> str:
    """Return an entry with its registry; its first component is one if it looks like a host."""
    entry = entry.rstrip("/")
    return entry if _is_registry(entry.partition("/")[0]) else _complete_name(entry)


def _complete_name(name: str) -> str:
    """Return a repository with its registry, which is docker.io unless the first component is a host."""
    first, slash, rest = name.partition("/")
    if not slash or not _is_registry(first):
        first, rest = "docker.io", name
    first = "docker.io" if first == "index.docker.io" else first
    return f"{first}/library/{rest}" if first == "docker.io" and "/" not in rest else f"{first}/{rest}"


def _is_registry(component: str) -> bool:
    """Return whether the first component of an image reference is a host, by the rule of the container runtimes."""
    return "." in component or ":" in component or component == "localhost" or component != component.lower()


def _is_at_host(url: SplitResult, entry: str) -> bool:
    wanted = urlsplit(f"//{entry}")
    try:
        ports = (url.port or _PORTS.get(url.scheme), wanted.port)
    except ValueError:  # above 65535
        return False
    return url.hostname == wanted.hostname and ports[1] in (None, ports[0])


def _describe(value: str, entries: tuple[str, ...]) -> str:
    more = "" if len(entries) <= _SHOWN_ENTRIES else f" and {len(entries) - _SHOWN_ENTRIES} more"
    return f"{value} is not allowed by the operator; it allows {', '.join(entries[:_SHOWN_ENTRIES])}{more}"
