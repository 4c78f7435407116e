"""The workers' processes in the simulated cluster: they train, save, finish, crash and hang, and their peers notice.

They report on /progress and in termination messages in the types of the contract between operator and trainer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import msgspec

from sailvl_operator.api import names
from sailvl_trainer.contract import Checkpoint, ExitCode, Progress, Result, Stage, Termination
from tests.support.apiserver.objects import Object, get_owner_uid

if TYPE_CHECKING:
    from tests.support.simulation.cluster import SimulatedCluster

STEPS_PER_STAGE = 1000
_STALL_SECONDS = 300.0


@dataclass(kw_only=True)
class StoredStage:
    """The state of a stage on the storage: step of its last checkpoint, and its result."""

    step: int = 0
    result: Result | None = None


@dataclass(kw_only=True)
class Gang:
    """All worker processes of one attempt."""

    job: str
    """The Job's uid."""
    stage: Stage
    step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = 0.0
    is_hung: bool = False
    is_finishing: bool = False


class SimulatedWorkers:
    """The gangs of all attempts and the storage that they share."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self.storage: dict[str, StoredStage] = {}
        self.gangs: dict[str, Gang] = {}
        self.must_succeed = False
        """Whether every gang finishes by itself, without a failure."""
        self.claim_preemption = False
        """Whether every gang exits as preempted as soon as it runs, and reports a checkpoint that is one step newer."""
        self.exits: list[tuple[str, str, int, int]] = []
        """Job's uid, stage, attempt and exit code of every worker that ended."""

    def get_stored(self, gang: Gang) -> StoredStage:
        """Return the state of a gang's stage on the storage."""
        return self.storage.setdefault(gang.stage.output, StoredStage())

    def list_working(self) -> list[Gang]:
        """Return the gangs whose workers all run and make progress."""
        return [g for g in self.gangs.values() if not g.is_hung and not g.is_finishing and self._is_complete(g)]

    def list_running_pods(self, gang: Gang) -> list[Object]:
        """Return a gang's pods whose phase is Running."""
        return [p for p in self._cluster.list_pods(gang.job) if p["status"]["phase"] == "Running"]

    def succeed_from_now_on(self) -> None:
        """Let every gang finish by itself; one that hangs exits as stalled."""
        self.must_succeed = True
        for gang in list(self.gangs.values()):
            self._cluster.call_later(1.0, 20.0, self._exit_as_stalled if gang.is_hung else self.finish, gang)

    def begin(self, pod: Object) -> None:
        """Start a worker's container; the last one of a gang starts the training."""
        uid = get_owner_uid(pod)
        job = self._cluster.api.find("jobs", uid)
        if job is None:
            return
        if uid not in self.gangs:
            text = job["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_STAGE]
            self.gangs[uid] = Gang(job=uid, stage=msgspec.json.decode(text, type=Stage))
        gang = self.gangs[uid]
        if self._is_complete(gang):
            gang.step, gang.began = self.get_stored(gang).step, self._cluster.api.clock()
            gang.seconds = {"starting": 2.0}
            gang.is_hung = gang.is_finishing = False  # a suspended Job has new pods
            if self.get_stored(gang).result is not None or self.must_succeed:
                self._cluster.call_later(1.0, 20.0, self.finish, gang)
            elif self.claim_preemption:
                gang.step = min(STEPS_PER_STAGE, gang.step + 1)
                self._save_and_exit(gang, 0.1)

    def train(self, gang: Gang, steps: int, *, saves: bool) -> None:
        """Advance a gang by some steps and save a checkpoint if `saves`."""
        spent = self._cluster.api.clock() - gang.began - sum(gang.seconds.values())
        gang.seconds["training"] = gang.seconds.get("training", 0.0) + max(0.0, spent * 0.9)
        gang.seconds["dataWait"] = gang.seconds.get("dataWait", 0.0) + max(0.0, spent * 0.1)
        gang.step = min(STEPS_PER_STAGE, gang.step + steps)
        if saves:
            self.get_stored(gang).step = gang.step

    def restart_in_place(self, gang: Gang) -> None:
        """Restart a gang's ranks from the last checkpoint, in the same pods."""
        gang.step = self.get_stored(gang).step

    def finish(self, gang: Gang, *, reports_result: bool = True) -> None:
        """ObjectWrite a gang's result to the storage and end its workers, one after the other."""
        if gang.is_hung or gang.is_finishing or not self._is_complete(gang):
            return
        gang.is_finishing = True
        stored, document = self.get_stored(gang), gang.stage
        is_reused = stored.result is not None
        stored.result = stored.result or self._result(gang)
        result = asdict(stored.result) | {"reused": is_reused, "attempt": document.attempt}
        for pod in self.list_running_pods(gang):
            own = {"result": result} if reports_result and self._has_first_index(pod) else {}
            self._cluster.call_later(
                0.0, 2.0, self._end, pod["metadata"]["uid"], ExitCode.OK, json.dumps({"exit_code": 0} | own)
            )

    def crash(self, pod: Object, code: int, *, reason: str = "Error", message: str | None = None) -> None:
        """End one worker with an error; its peers exit, or hang."""
        termination = Termination(exit_code=code, rank=0, message=f"exit {code}", traceback="Traceback: …")
        text = json.dumps(asdict(termination)) if message is None else message
        self._end(pod["metadata"]["uid"], code, text, reason)
        self.lose(pod)

    def lose(self, pod: Object) -> None:
        """Leave the peers of a pod that is dead or cut off waiting for it."""
        gang = self.gangs.get(get_owner_uid(pod))
        if gang is not None:
            self._lose_peer(gang, pod)

    def terminate(self, uid: str) -> None:
        """Handle SIGTERM: with enough grace the gang saves a checkpoint and exits."""
        pod = self._cluster.api.find("pods", uid)
        if pod is None:
            return
        if pod["status"]["phase"] != "Running":
            self._cluster.remove_ended_pod(uid)
            return
        gang = self.gangs.get(get_owner_uid(pod))
        grace = float(pod["metadata"]["deletionGracePeriodSeconds"])
        save_seconds = self._cluster.rng.uniform(0.2, 8.0)
        if gang is not None and not gang.is_hung and save_seconds <= grace and self._is_complete(gang):
            self._save_and_exit(gang, save_seconds)
            return
        code = self._cluster.rng.choice([int(ExitCode.TERMINATED), 137])
        message = "" if code == 137 else json.dumps({"exit_code": code, "message": "SIGTERM"})
        self._cluster.call_later(grace, grace, self._end, uid, code, message)
        if gang is not None:
            self._lose_peer(gang, pod)

    def _save_and_exit(self, gang: Gang, seconds: float) -> None:
        if gang.is_finishing:
            return
        gang.is_finishing = True
        self.get_stored(gang).step = gang.step
        text = json.dumps(
            {
                "exit_code": int(ExitCode.PREEMPTED),
                "message": "checkpoint saved",
                "checkpoint": asdict(self._build_checkpoint(gang)),
            }
        )
        for pod in self.list_running_pods(gang):
            self._cluster.call_later(
                seconds, seconds + 1.0, self._end, pod["metadata"]["uid"], int(ExitCode.PREEMPTED), text
            )

    def read_progress(self, ip: str) -> Progress | None:
        """Return what /progress at a pod's address answers, or None if nothing serves it."""
        found = (p for p in self._cluster.api.list_objects("pods") if p["status"].get("podIP") == ip)
        pod = next(found, None)
        gang = None if pod is None else self.gangs.get(get_owner_uid(pod))
        if pod is None or gang is None or pod["status"]["phase"] != "Running" or not gang.began:
            return None
        stored = self.get_stored(gang).step
        return Progress(
            attempt=gang.stage.attempt,
            phase="running",
            step=gang.step,
            steps=STEPS_PER_STAGE,
            tokens=gang.step * 4096,
            eta_seconds=float(STEPS_PER_STAGE - gang.step),
            metrics={"loss": 1.0 + 1.0 / (1 + gang.step)},
            checkpoint=self._build_checkpoint(gang) if stored else None,
            seconds=dict(gang.seconds),
            time=self._cluster.api.clock(),
        )

    def _build_checkpoint(self, gang: Gang) -> Checkpoint:
        step, folder = self.get_stored(gang).step, gang.stage.output.removeprefix(f"{gang.stage.storage}/")
        return Checkpoint(step=step, path=f"{folder}/checkpoints/{step}")

    def _result(self, gang: Gang) -> Result:
        document = gang.stage
        return Result(
            stage=document.stage,
            kind=document.kind,
            digest=document.digest,
            attempt=document.attempt,
            output=document.output.removeprefix(f"{document.storage}/"),
            steps=STEPS_PER_STAGE,
            seconds=100.0,
            metrics={"heldOutLoss": 1.5},
        )

    def _is_complete(self, gang: Gang) -> bool:
        job = self._cluster.api.find("jobs", gang.job)
        nodes = self._cluster.nodes
        alive = [p for p in self.list_running_pods(gang) if nodes[p["spec"]["nodeName"]].unreachable_since is None]
        return job is not None and len(alive) == job["spec"]["completions"]

    def _has_first_index(self, pod: Object) -> bool:
        return bool(pod["metadata"]["labels"][names.LABEL_COMPLETION_INDEX] == "0")

    def _lose_peer(self, gang: Gang, lost: Object) -> None:
        if gang.is_hung or gang.is_finishing:
            return
        gang.is_hung = True
        self._cluster.call_later(_STALL_SECONDS, _STALL_SECONDS + 60, self._exit_as_stalled, gang)
        for pod in self.list_running_pods(gang):
            if pod["metadata"]["uid"] != lost["metadata"]["uid"] and self._cluster.rng.random() < 0.7:
                text = json.dumps({"exit_code": int(ExitCode.PEER_LOST), "message": "a peer is gone"})
                self._cluster.call_later(0.1, 5.0, self._end, pod["metadata"]["uid"], int(ExitCode.PEER_LOST), text)

    def _exit_as_stalled(self, gang: Gang) -> None:
        """End a hanging gang's workers, as their watchdogs do."""
        for pod in self.list_running_pods(gang):
            self._end(
                pod["metadata"]["uid"], int(ExitCode.STALLED), json.dumps({"exit_code": 68, "message": "stalled"})
            )

    def _end(self, uid: str, code: int, message: str, reason: str = "") -> None:
        pod = self._cluster.api.find("pods", uid)
        if pod is None or pod["status"]["phase"] != "Running":
            return
        finished = self._cluster.api.format_time()
        self._cluster.when_reachable(pod, lambda: self._report(uid, int(code), message, reason, finished))

    def _report(self, uid: str, code: int, message: str, reason: str, finished: str) -> None:
        pod = self._cluster.api.find("pods", uid)
        if pod is None or pod["status"]["phase"] != "Running":
            return
        labels = pod["metadata"]["labels"]
        self.exits.append((get_owner_uid(pod), labels[names.LABEL_STAGE], int(labels[names.LABEL_ATTEMPT]), code))
        why = reason or ("Completed" if code == 0 else "Error")
        state = {"exitCode": code, "reason": why, "message": message, "finishedAt": finished}
        phase = "Succeeded" if code == 0 else "Failed"
        conditions = [c | {"status": "False"} if c["type"] == "Ready" else c for c in pod["status"]["conditions"]]
        self._cluster.set_container(pod, {"terminated": state}, phase=phase, conditions=conditions)
        if "deletionTimestamp" in pod["metadata"]:
            self._cluster.call_later(0.0, 0.5, self._cluster.remove_ended_pod, uid)
