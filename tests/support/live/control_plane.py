"""A control plane without nodes, for tests that simulate the kubelet: etcd, API server and controller manager on free
ports. The controllers' client limit is 500 requests per second, so that tests don't wait for throttled controllers.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

_CONTROLLERS = "job-controller,namespace-controller,garbage-collector-controller"
_READY_TIMEOUT_SECONDS = 60.0


@contextmanager
def start_control_plane(binaries: Path, folder: Path) -> Iterator[Path]:
    """Start a control plane, yield its kubeconfig, and stop it at the end; `binaries` has its programs and kubectl."""
    etcd, peers, api, controllers = _free_ports(4)
    kubeconfig, key = _write_credentials(folder, api)
    client = f"http://127.0.0.1:{etcd}"
    with ExitStack() as stack:

        def start(program: str, **flags: object) -> None:
            arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
            stack.enter_context(_run_process([str(binaries / program), *arguments], folder / f"{program}.log"))

        start(
            "etcd",
            data_dir=folder / "etcd",
            unsafe_no_fsync="true",
            listen_client_urls=client,
            advertise_client_urls=client,
            listen_peer_urls=f"http://127.0.0.1:{peers}",
            log_level="error",
        )
        start(
            "kube-apiserver",
            etcd_servers=client,
            bind_address="127.0.0.1",
            secure_port=api,
            cert_dir=folder / "certificates",
            token_auth_file=folder / "tokens.csv",
            authorization_mode="RBAC",
            service_account_issuer="https://kubernetes.default.svc",
            service_account_key_file=key,
            service_account_signing_key_file=key,
            service_cluster_ip_range="10.0.0.0/16",
            disable_admission_plugins="ServiceAccount",
        )
        _wait_until_ready(binaries / "kubectl", kubeconfig, folder)
        start(
            "kube-controller-manager",
            kubeconfig=kubeconfig,
            controllers=_CONTROLLERS,
            leader_elect="false",
            kube_api_qps=500,
            kube_api_burst=750,
            secure_port=controllers,
            cert_dir=folder / "certificates",
        )
        yield kubeconfig


def _write_credentials(folder: Path, port: int) -> tuple[Path, Path]:
    (folder / "tokens.csv").write_text("test,admin,admin,system:masters\n")
    key = folder / "service-accounts.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "test", "cluster": {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}}
        ],
        "users": [{"name": "test", "user": {"token": "test"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(document))
    return kubeconfig, key


@contextmanager
def _run_process(command: list[str], log: Path) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(kubectl: Path, kubeconfig: Path, folder: Path) -> None:
    end = time.monotonic() + _READY_TIMEOUT_SECONDS
    command = [str(kubectl), f"--kubeconfig={kubeconfig}", "get", "--raw=/readyz"]
    while subprocess.run(command, capture_output=True, check=False).returncode:
        assert time.monotonic() < end, (folder / "kube-apiserver.log").read_text()[-2000:]
        time.sleep(0.5)


def _free_ports(number: int) -> list[int]:
    """Return free ports; all are bound until the last is known, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
