"""A control plane without nodes on free ports of this machine: etcd, API server, controller manager and, if wanted, the
scheduler. Used by tests that simulate the kubelet, and by the operator's benchmark, which adds fake nodes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

_READY_TIMEOUT_SECONDS = 90.0

Flags = Mapping[str, object]
"""Flags of a program by name, with underscores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlPlaneProfile:
    """Flags and environment of one kind of control plane."""

    etcd: Flags = field(default_factory=dict)
    api_server: Flags = field(default_factory=dict)
    controller_manager: Flags = field(default_factory=dict)
    scheduler: Flags | None = None
    """Flags of the scheduler. None, the default, starts none."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of all programs."""


JOBS_ONLY = ControlPlaneProfile(
    api_server={"disable_admission_plugins": "ServiceAccount"},
    controller_manager={
        "controllers": "job-controller,namespace-controller,garbage-collector-controller",
        "kube_api_qps": 500,
        "kube_api_burst": 750,
    },
)
"""Controllers of Jobs only. Their client limit is raised, so that tests don't wait for throttled controllers."""


class ControlPlaneProcesses:
    """Processes of a control plane.

    `binaries`: folder with the programs and kubectl. `folder`: empty folder for data, credentials and logs.
    """

    def __init__(self, binaries: Path, folder: Path, profile: ControlPlaneProfile) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self.certificate_authority = (
            folder / "certificates/apiserver.crt"
        )  # a self-signed certificate, written by the API server
        self.token = "test"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._binaries, self._folder, self._profile = binaries, folder, profile
        self._etcd_port, self._peer_port, port = _free_ports(3)
        self._port = port
        self.server = f"https://127.0.0.1:{port}"

    def start(self) -> None:
        """Start all programs. Returns when the API server is ready; raises RuntimeError if it doesn't become ready."""
        key = self._write_credentials()
        self._start_etcd()
        self._start_api_server(key)
        self._wait_until_ready()
        shared = {"kubeconfig": self.kubeconfig, "leader_elect": "false", "secure_port": 0}
        signing = {"service_account_private_key_file": key, "root_ca_file": self.certificate_authority}
        self.start_program("kube-controller-manager", shared | signing | dict(self._profile.controller_manager))
        if self._profile.scheduler is not None:
            self.start_program("kube-scheduler", shared | dict(self._profile.scheduler))

    def start_program(self, name: str, flags: Flags) -> None:
        """Start a program, with its log in the folder."""
        arguments = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items()]
        with (self._folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [str(self._binaries / name), *arguments],
                env=os.environ | self._profile.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Kill all programs, the last one first."""
        for process in reversed(self.processes.values()):
            process.kill()
            process.wait()
        self.processes.clear()

    def _start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        flags = {
            "data_dir": self._folder / "etcd",
            "unsafe_no_fsync": "true",
            "listen_client_urls": client,
            "advertise_client_urls": client,
            "listen_peer_urls": peer,
            "log_level": "error",
        }
        self.start_program("etcd", flags | dict(self._profile.etcd))

    def _start_api_server(self, key: Path) -> None:
        flags = {
            "etcd_servers": f"http://127.0.0.1:{self._etcd_port}",
            "bind_address": "127.0.0.1",
            "secure_port": self._port,
            "cert_dir": self.certificate_authority.parent,
            "token_auth_file": self._folder / "tokens.csv",
            "authorization_mode": "RBAC",
            "service_account_issuer": "https://kubernetes.default.svc",
            "service_account_key_file": key,
            "service_account_signing_key_file": key,
            "service_cluster_ip_range": "10.0.0.0/16",
        }
        self.start_program("kube-apiserver", flags | dict(self._profile.api_server))

    def _write_credentials(self) -> Path:
        """Write token file and kubeconfig of an administrator. Return the key of the service accounts."""
        (self._folder / "tokens.csv").write_text(f"{self.token},admin,admin,system:masters\n")
        key = self._folder / "service-accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        cluster = {"server": self.server, "certificate-authority": str(self.certificate_authority)}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": self.token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        self.kubeconfig.write_text(yaml.safe_dump(document))
        return key

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + _READY_TIMEOUT_SECONDS
        command = [str(self._binaries / "kubectl"), f"--kubeconfig={self.kubeconfig}", "get", "--raw=/readyz"]
        while subprocess.run(command, capture_output=True, check=False).returncode:
            if time.monotonic() > end:
                log = (self._folder / "kube-apiserver.log").read_text()[-2000:]
                raise RuntimeError(f"API server not ready after {_READY_TIMEOUT_SECONDS:.0f} s:\n{log}")
            time.sleep(0.5)


@contextmanager
def start_control_plane(binaries: Path, folder: Path, profile: ControlPlaneProfile = JOBS_ONLY) -> Iterator[Path]:
    """Start a control plane, yield its kubeconfig, and stop it at the end; `binaries` has its programs and kubectl."""
    plane = ControlPlaneProcesses(binaries, folder, profile)
    try:
        plane.start()
        yield plane.kubeconfig
    finally:
        plane.stop()


def _free_ports(number: int) -> list[int]:
    """Return free ports; all are bound until the last is known, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
