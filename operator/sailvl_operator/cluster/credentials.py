"""The way into a cluster, found by the kubernetes package: kubeconfig (client certificate, token, exec plugin) or the
pod's service account. The client asks for headers; a token is read again before it expires.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from typing import Any

import aiohttp
import kubernetes.client
import kubernetes.config

from sailvl_operator.errors import CredentialsError

REFRESH_SECONDS = 45.0
"""A service account's token is rotated well before it expires; the package reads its file once a minute."""

_IDLE_SECONDS = 15
"""A connection that is silent for so long is probed: on a watch nothing else would notice that the peer is gone."""
_DEAD_SECONDS = 5
"""Without an acknowledgement for so long a connection is given up, and what was not delivered with it: a write must not
arrive when the network is back and another replica leads."""


class Credentials:
    """Server, TLS context and authorization header of one cluster."""

    def __init__(self, configuration: Any) -> None:
        self.configuration = configuration
        self._header = ""
        self._read_at = float("-inf")
        self.server: str = configuration.host.rstrip("/")
        self.ssl = _build_ssl(configuration) if self.server.startswith("https:") else None

    async def headers(self) -> dict[str, str]:
        """The authorization header, or nothing where the client certificate is enough."""
        if time.monotonic() - self._read_at > REFRESH_SECONDS:
            self._header = await asyncio.to_thread(self._read)  # an exec plugin may take seconds
            self._read_at = time.monotonic()
        return {"Authorization": self._header} if self._header else {}

    def forget(self) -> None:
        """After a 401: the next request reads the token again."""
        self._read_at = float("-inf")

    def _read(self) -> str:
        setting = self.configuration.auth_settings().get("BearerToken")
        if setting and setting["value"]:
            return str(setting["value"])
        if self.configuration.username:
            return str(self.configuration.get_basic_auth_token())
        return ""


def build_connector(credentials: Credentials, *, limit: int) -> aiohttp.TCPConnector:
    """At most `limit` connections at once, 0: any number; they notice when the peer is gone."""
    return aiohttp.TCPConnector(limit=limit, ssl=credentials.ssl or True, socket_factory=_open_socket)


def _open_socket(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    opened = socket.socket(family, kind, protocol)
    options = {"TCP_KEEPIDLE": _IDLE_SECONDS, "TCP_KEEPINTVL": _DEAD_SECONDS, "TCP_USER_TIMEOUT": 1000 * _DEAD_SECONDS}
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has each of them
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return opened


def load_credentials(kubeconfig: str = "", context: str = "") -> Credentials:
    """A named kubeconfig, $KUBECONFIG, the pod's service account, or ~/.kube/config, in this order."""
    configuration = kubernetes.client.Configuration()
    try:
        if not kubeconfig and not context and "KUBECONFIG" not in os.environ and _is_in_cluster():
            kubernetes.config.load_incluster_config(client_configuration=configuration)
        else:
            kubernetes.config.load_kube_config(
                config_file=kubeconfig or None, context=context or None, client_configuration=configuration
            )
    except kubernetes.config.ConfigException as error:
        raise CredentialsError(f"no cluster to talk to: {error}; give --kubeconfig or set KUBECONFIG") from error
    return Credentials(configuration)


def _is_in_cluster() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ


def _build_ssl(configuration: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert or None)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    return context
