"""Find entries of allow-lists that no run can match, and compare images and servers with the others.

Images are read as container runtimes read them: without a host they are on docker.io.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from sailvl_operator.api.scalars import SUBDOMAIN, is_label_key

_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65535
_MAX_NAME_LENGTH = 253
_HOST = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*|\[[0-9a-f:.]+\]"
_REPOSITORY = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"

_SCHEME = "has a scheme; leave it out"


def describe_image_error(entry: str) -> str:
    """Return why no image is from this registry or repository; empty if one may be."""
    if "://" in entry:
        return _SCHEME
    first, slash, rest = entry.rstrip("/").partition("/")
    names = rest.split("/") if slash else []
    if not _is_registry(first):
        names.insert(0, first)
    elif error := _describe_host_error(first):
        return error
    if any(":" in name or "@" in name for name in names):
        return "has a tag or a digest; leave it out"
    if not all(re.fullmatch(_REPOSITORY, name) for name in names):
        return "is neither a registry nor a repository; write it like registry.example.com/team, in lower-case letters"
    return ""


def describe_host_error(entry: str) -> str:
    """Return why no server is at this host; empty if one may be."""
    return _describe_host_error(entry.lower())


def describe_name_error(entry: str) -> str:
    """Return why no object of Kubernetes has this name; empty if one may have it."""
    is_name = len(entry) <= _MAX_NAME_LENGTH and re.fullmatch(SUBDOMAIN, entry) is not None
    return "" if is_name else "is not a name; write it in lower-case letters, digits, - and ."


def describe_key_error(entry: str) -> str:
    """Return why no taint has this key; empty if one may have it."""
    return "" if is_label_key(entry) else "is not the key of a taint; write it like nvidia.com/gpu, without a value"


def is_image_at(image: str, entry: str) -> bool:
    """Return whether an image is from the registry or the repository of an entry, or from one below it."""
    repository, prefix = _find_repository(image), _complete_entry(entry)
    return repository == prefix or repository.startswith(f"{prefix}/")


def is_server_at(url: str, entry: str) -> bool:
    """Return whether a server is at the host of an entry, and at its port if it has one."""
    server, wanted = urlsplit(url), urlsplit(f"//{entry}")
    try:
        port = server.port or _PORTS.get(server.scheme)
    except ValueError:  # above 65535
        return False
    return server.hostname == wanted.hostname and wanted.port in (None, port)


def _describe_host_error(entry: str) -> str:
    if "://" in entry:
        return _SCHEME
    host, colon, port = entry.rpartition(":")
    if not colon or entry.endswith("]"):
        host, colon = entry, ""
    if re.fullmatch(_HOST, host) is None:
        return "is not a host; write it like registry.example.com or judge.team.svc:8000, in lower-case letters"
    if colon and not (re.fullmatch("[1-9][0-9]{0,4}", port) and int(port) <= _MAX_PORT):
        return f"has no port after the colon; set one from 1 to {_MAX_PORT}, or remove the colon and what follows"
    return ""


def _find_repository(image: str) -> str:
    """Return registry and repository of an image reference, without tag and digest, as container runtimes read it."""
    name = image.partition("@")[0]
    parent, slash, last = name.rpartition("/")
    return _complete_name(f"{parent}{slash}{last.partition(':')[0]}")


def _complete_entry(entry: str) -> str:
    """Return an entry with its registry; its first component is one if it looks like a host."""
    registry, slash, rest = entry.rstrip("/").partition("/")
    if not _is_registry(registry):
        return _complete_name(f"{registry}{slash}{rest}")
    registry = "docker.io" if registry == "index.docker.io" else registry
    return f"{registry}{slash}{rest}"


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
