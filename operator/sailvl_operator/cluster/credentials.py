"""Credentials for a cluster, loaded by the kubernetes package: a kubeconfig (client certificate, token or exec plugin)
or the pod's service account. Tokens are read again before they expire.
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
"""Seconds after which a token is read again. The kubernetes package reads the token file of a service account once a
minute, and the kubelet rotates it well before it expires."""

_KEEPALIVE_SECONDS = 15
"""A connection is probed when it has been idle for this long. On a watch nothing else detects that the peer is gone."""
_ACKNOWLEDGE_SECONDS = 5
"""A connection without an acknowledgement for this long is closed, and undelivered data is dropped. A write must not
arrive after an outage, when another replica may lead."""


class Credentials:
    """Server URL, TLS context and authorization header of one cluster."""

    def __init__(self, configuration: Any) -> None:
        self.configuration = configuration
        self._header = ""
        self._read_at = float("-inf")
        self.server: str = configuration.host.rstrip("/")
        self.ssl = _build_ssl(configuration) if self.server.startswith("https:") else None

    async def headers(self) -> dict[str, str]:
        """Return the authorization header; empty if a client certificate is used."""
        if time.monotonic() - self._read_at > REFRESH_SECONDS:
            self._header = await asyncio.to_thread(self._read)  # an exec plugin may take seconds
            self._read_at = time.monotonic()
        return {"Authorization": self._header} if self._header else {}

    def forget(self) -> None:
        """Read the token again for the next request. Called after a 401."""
        self._read_at = float("-inf")

    def _read(self) -> str:
        setting = self.configuration.auth_settings().get("BearerToken")
        if setting and setting["value"]:
            return str(setting["value"])
        if self.configuration.username:
            return str(self.configuration.get_basic_auth_token())
        return ""


def build_connector(credentials: Credentials, *, limit: int) -> aiohttp.TCPConnector:
    """Build a connector whose connections detect that the peer is gone. `limit`: maximum number of open connections; 0:
    unlimited."""
    return aiohttp.TCPConnector(limit=limit, ssl=credentials.ssl or True, socket_factory=_open_socket)


def _open_socket(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    opened = socket.socket(family, kind, protocol)
    options = {
        "TCP_KEEPIDLE": _KEEPALIVE_SECONDS,
        "TCP_KEEPINTVL": _ACKNOWLEDGE_SECONDS,
        "TCP_USER_TIMEOUT": 1000 * _ACKNOWLEDGE_SECONDS,
    }
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # only Linux has all of them
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return opened


def load_credentials(kubeconfig: str = "", context: str = "") -> Credentials:
    """Load the given kubeconfig, $KUBECONFIG, the pod's service account or ~/.kube/config, in this order.

    Raises CredentialsError.
    """
    configuration = kubernetes.client.Configuration()
    try:
        if not kubeconfig and not context and "KUBECONFIG" not in os.environ and _is_in_cluster():
            kubernetes.config.load_incluster_config(client_configuration=configuration)
        else:
            kubernetes.config.load_kube_config(
                config_file=kubeconfig or None, context=context or None, client_configuration=configuration
            )
    except kubernetes.config.ConfigException as error:
        raise CredentialsError(f"no credentials for a cluster: {error}; set --kubeconfig or KUBECONFIG") from error
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
