"""Run without a cluster: torchx's local_cwd scheduler executes the decisions of `reconcile` on this machine.

The status is <root>/<run>/status.json and has the schema of a cluster's; a run that was killed resumes from it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from torchx.schedulers.local_scheduler import CWDImageProvider, LocalScheduler
from torchx.specs import AppDef

from sailvl_operator.api import names
from sailvl_operator.api.status import Status, encode_status
from sailvl_operator.api.types import Defaults, Run
from sailvl_operator.api.untrusted import DocumentError
from sailvl_operator.core.decision import AttemptSpec, Decision, DeletionMode, Event
from sailvl_operator.core.desired.workload import build_appdef, count_nodes, encode_document
from sailvl_operator.core.observe import AttemptKey, JobRecord, Observed, PodRecord, Terminated, observe
from sailvl_operator.core.reconcile import reconcile
from sailvl_operator.core.reports import build_terminated, decode_progress
from sailvl_trainer.contract import Env, Progress

POLL_SECONDS = 0.5
REPLICA = "${replica_id}"
"""Macro of torchx for the index of a worker."""

T = TypeVar("T")
OnStatus = Callable[[Status, tuple[Event, ...]], None]


class LockedError(Exception):
    """Another process executes this run."""


class LocalStateError(Exception):
    """The root or a file in it can't be used. The message names it and says what to do."""


@dataclass(slots=True, kw_only=True)
class LocalAttempt:
    """A started attempt and the folder with the files of its workers."""

    app_id: str
    record: JobRecord
    folder: Path
    ended: dict[int, Terminated] = field(default_factory=dict)
    """Terminated state of each worker that has exited, by its index."""


@dataclass(slots=True)
class LocalRun:
    """One run on this machine."""

    run: Run
    root: Path
    python: str = sys.executable
    scheduler: LocalScheduler = field(init=False)
    attempts: dict[AttemptKey, LocalAttempt] = field(default_factory=dict)
    status: Status = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self.scheduler = LocalScheduler("sailvl", CWDImageProvider)
        if self.root.exists() and not self.root.is_dir():
            raise LocalStateError(f"{self.root} is not a directory; set --root to one")
        advice = "delete it to start the run anew: results of finished stages and checkpoints are found again"
        self.status = _read_state(self.folder / "status.json", Status, advice=advice) or Status()

    @property
    def folder(self) -> Path:
        """Folder of the run's status and of its workers' files, beside the results of its stages."""
        return self.root / self.run.name

    def run_to_completion(self, on_status: OnStatus) -> Status:
        """Reconcile until the run has finished, and return its last status.

        `on_status` is called with every status and its events. Raises LockedError if another process executes the run.
        """
        with self._locked(), self._killing_workers():
            self._end_orphans()
            defaults = Defaults(image="local", storage=str(self.root), failure_settle_seconds=1.0, backoff_seconds=2.0)
            while not self.status.is_finished or self.attempts:
                run = msgspec.structs.replace(self.run, status=encode_status(self.status))
                decision = reconcile(run, self._observe(), now=time.time(), defaults=defaults)
                self._apply(decision)
                on_status(self.status, decision.events)
                if self.status.is_finished and not _find_deleted_jobs(decision):
                    break
                if decision.status is None and not decision.start:
                    time.sleep(POLL_SECONDS)
        return self.status

    def _apply(self, decision: Decision) -> None:
        for job in _find_deleted_jobs(decision):
            self._end(self.attempts.pop((job.stage, job.attempt)))
        for attempt in decision.start:
            self._start(attempt)
        if decision.status is not None:
            self.status = decision.status
            _write(self.folder / "status.json", msgspec.json.format(msgspec.json.encode(self.status)))

    def _observe(self) -> Observed:
        pods: list[PodRecord] = []
        progress: dict[AttemptKey, Progress] = {}
        for key, attempt in self.attempts.items():
            pods += self._observe_workers(attempt)
            document = _read_progress(attempt.folder / "0" / "progress.json")
            if document is not None:
                progress[key] = document
        return observe((a.record for a in self.attempts.values()), pods, progress=progress)

    def _observe_workers(self, attempt: LocalAttempt) -> Iterator[PodRecord]:
        replicas = self.scheduler._apps[attempt.app_id].role_replicas[names.CONTAINER]
        for index, replica in enumerate(replicas):
            end = _observe_end(attempt, index, replica.proc.poll())
            yield PodRecord(
                namespace=attempt.record.namespace,
                name=f"{attempt.record.name}-{index}",
                uid=f"{attempt.app_id}-{index}",
                run=attempt.record.run,
                stage=attempt.record.stage,
                attempt=attempt.record.attempt,
                index=index,
                phase="Running" if end is None else "Failed" if end.exit_code else "Succeeded",
                node=socket.gethostname(),
                placed=attempt.record.created,
                is_ready=end is None,
                terminated=end,
                ended_seen=0.0 if end is None else end.finished,
            )

    def _start(self, attempt: AttemptSpec) -> None:
        document = attempt.document
        name = names.job_name(document.run, document.stage, document.attempt)
        folder = self.folder / "workers" / name
        _write(folder / "stage.json", encode_document(document).encode())
        app = build_appdef(attempt, rendezvous_secret=secrets.token_hex(16))
        app = localise(app, folder, self.python, _free_port(), _free_port())
        app_id = self.scheduler.schedule(self.scheduler.submit_dryrun(app, {"log_dir": str(folder / "logs")}))
        record = JobRecord(
            namespace=document.namespace,
            name=name,
            uid=app_id,
            run=document.run,
            stage=document.stage,
            attempt=document.attempt,
            owner_uid=self.run.uid,
            nodes=count_nodes(attempt.workers),
            created=time.time(),
            started=time.time(),
        )
        self.attempts[document.stage, document.attempt] = LocalAttempt(app_id=app_id, record=record, folder=folder)
        replicas = self.scheduler._apps[app_id].role_replicas[names.CONTAINER]
        _write(self.folder / "processes.json", json.dumps([r.proc.pid for r in replicas]).encode())

    def _end(self, attempt: LocalAttempt) -> None:
        for replica in self.scheduler._apps[attempt.app_id].role_replicas[names.CONTAINER]:
            _kill_group(replica.proc.pid)

    def _end_orphans(self) -> None:
        """Kill workers that a killed process left behind, which are recognised by their PID and their command line."""
        advice = "end the workers of an earlier `sailvl run` of this run, if there are any, and delete it"
        for pid in _read_state(self.folder / "processes.json", list[int], advice=advice) or ():
            command = Path(f"/proc/{pid}/cmdline")
            if command.exists() and b"sailvl_trainer" in command.read_bytes():
                _kill_group(pid)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            message = f"{self.folder} can't be written ({error.strerror}); set --root to a directory of your own"
            raise LocalStateError(message) from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise LockedError(
                    f"another process is running {self.run.name} in {self.root}; wait for it or stop it"
                ) from None
            yield

    @contextmanager
    def _killing_workers(self) -> Iterator[None]:
        """Kill all workers when this process ends; only a process that is killed itself leaves workers behind."""
        try:
            yield
        finally:
            for attempt in self.attempts.values():
                self._end(attempt)


def _find_deleted_jobs(decision: Decision) -> list[JobRecord]:
    """Return the Jobs whose workers have to be killed; a graceful deletion waits for the end of this process."""
    return [
        *decision.get_deleted_jobs(DeletionMode.BEFORE_STARTS),
        *decision.get_deleted_jobs(DeletionMode.FORCE),
    ]


def localise(app: AppDef, folder: Path, python: str, rendezvous_port: int, metrics_port: int) -> AppDef:
    """Adapt an AppDef of the cluster to processes that share this machine."""
    (role,) = app.roles
    here = {
        Env.STAGE_FILE: str(folder / "stage.json"),
        Env.NODE_RANK: REPLICA,
        Env.NODE_NAME: socket.gethostname(),
        Env.RENDEZVOUS_HOST: "localhost",
        Env.RENDEZVOUS_PORT: str(rendezvous_port),
        Env.METRICS_PORT: str(metrics_port),
        Env.METRICS_PORT_OFFSET: REPLICA,
        Env.TERMINATION_LOG: f"{folder}/{REPLICA}/termination.json",
        Env.SCRATCH: f"{folder}/{REPLICA}",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // role.num_replicas)),
    }
    return replace(app, roles=[replace(role, image=".", entrypoint=python, env=role.env | here, mounts=[])])


def _observe_end(attempt: LocalAttempt, index: int, code: int | None) -> Terminated | None:
    if code is not None and index not in attempt.ended:
        attempt.ended[index] = _terminated(code, attempt.folder / str(index))
    return attempt.ended.get(index)


def _terminated(code: int, folder: Path) -> Terminated:
    path = folder / "termination.json"
    message = path.read_text(errors="replace") if path.exists() else ""
    return build_terminated(exit_code=code if code >= 0 else 128 - code, message=message, finished=time.time())


def _read_progress(path: Path) -> Progress | None:
    try:
        return decode_progress(path.read_bytes())
    except (OSError, DocumentError):
        return None


def _kill_group(pid: int) -> None:
    """Kill a worker and its ranks; torchx starts each worker in its own session, and torch the ranks in that one."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _read_state(path: Path, type_: type[T], *, advice: str) -> T | None:
    """Read a file of the run's folder; None if there is none. Raises LocalStateError if it can't be decoded."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise LocalStateError(f"{path} can't be read ({error}); {advice}") from error


def _write(path: Path, data: bytes) -> None:
    """Replace a file so that a crash of the process or of the machine leaves the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def parse_local(document: dict[str, Any], parse: Callable[[dict[str, Any]], Run]) -> Run:
    """Parse a run's file after adding the UID, namespace and generation that the API server would set."""
    metadata = {"namespace": "default", "uid": "local", "generation": 1, "resourceVersion": "1"} | document["metadata"]
    return parse(document | {"metadata": metadata})
