"""The kopf edge: events of runs in, nothing decided, nothing written. `cli/operator.py` builds it and runs kopf.

Only `on.event` is used: no finalizers, no annotations, no timers, no indices, so kopf itself never patches a run.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import kopf

from sailvl_operator.api import names
from sailvl_operator.cluster.credentials import Credentials

Sink = Callable[[str | None, dict[str, Any]], None]
"""Called with the watch event's type (None: listed) and the whole object."""

_LOGIN_MINUTES = 10
"""kopf asks for a fresh token so often; also at once after a 401."""


def build_registry(sink: Sink, credentials: Credentials, *, watch_timeout: int) -> kopf.OperatorRegistry:
    """kopf's handlers, in a registry of their own."""
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False
        settings.persistence.diffbase_storage = _NoEssence()
        settings.scanning.disabled = True
        settings.peering.standalone = True
        settings.watching.server_timeout = watch_timeout
        settings.watching.connect_timeout = 10

    @kopf.on.login(registry=registry)
    async def connect(**_: Any) -> kopf.ConnectionInfo:
        return await _connect(credentials)

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
    async def see(event: kopf.RawEvent, **_: Any) -> None:
        sink(event["type"], dict(event["object"]))

    return registry


class _NoEssence(kopf.DiffBaseStorage):
    """kopf copies every object to tell changes of its essence apart; we look at every event, so nothing is copied."""

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        return None


async def _connect(credentials: Credentials) -> kopf.ConnectionInfo:
    credentials.forget()
    scheme, _, token = (await credentials.headers()).get("Authorization", "").partition(" ")
    configuration = credentials.configuration
    return kopf.ConnectionInfo(
        server=credentials.server,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        scheme=scheme or None,
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        expiration=datetime.now(UTC) + timedelta(minutes=_LOGIN_MINUTES) if token else None,
    )
