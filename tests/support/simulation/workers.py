"""The workers' processes in the model of the cluster: gangs that train, save, finish, crash, hang, and take their peers
along; what they say on /progress and in their termination messages, by the contract's own types.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import msgspec

from sailvl_operator.api import names
from sailvl_trainer.contract import Checkpoint, ExitCode, Progress, Result, Stage, Termination
from tests.support.simulation.api import Object, owner_of

if TYPE_CHECKING:
    from tests.support.simulation.cluster import Cluster

STEPS = 1000
"""Of every stage."""
_STALL_SECONDS = 300.0


@dataclass(kw_only=True)
class Saved:
    """What the storage keeps of a stage."""

    step: int = 0
    result: Result | None = None


@dataclass(kw_only=True)
class Gang:
    """One attempt's processes."""

    job: str
    """uid"""
    document: Stage
    step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = 0.0
    is_hung: bool = False
    is_finishing: bool = False


class Workers:
    """All gangs and the storage that they share."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.storage: dict[str, Saved] = {}
        self.gangs: dict[str, Gang] = {}
        self.is_obedient = False
        """Gangs finish by themselves."""
        self.exits: list[tuple[str, str, int, int]] = []
        """Of every worker: the Job's uid, stage, attempt, exit code."""

    def saved(self, gang: Gang) -> Saved:
        return self.storage.setdefault(gang.document.output, Saved())

    def whole(self) -> list[Gang]:
        """Gangs whose workers all run and can work."""
        return [g for g in self.gangs.values() if not g.is_hung and not g.is_finishing and self._is_whole(g)]

    def running(self, gang: Gang) -> list[Object]:
        return [p for p in self._cluster.pods_of(gang.job) if p["status"]["phase"] == "Running"]

    def obey(self) -> None:
        """From now on every gang succeeds; one that hangs gives up."""
        self.is_obedient = True
        for gang in list(self.gangs.values()):
            self._cluster.later(1.0, 20.0, self._give_up if gang.is_hung else self.finish, gang)

    def begin(self, pod: Object) -> None:
        """A worker's container starts; the last of a gang begins the work."""
        uid = owner_of(pod)
        job = self._cluster.api.find("jobs", uid)
        if job is None:
            return
        if uid not in self.gangs:
            text = job["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_STAGE]
            self.gangs[uid] = Gang(job=uid, document=msgspec.json.decode(text, type=Stage))
        gang = self.gangs[uid]
        if self._is_whole(gang):
            gang.step, gang.began = self.saved(gang).step, self._cluster.api.clock()
            gang.seconds = {"starting": 2.0}
            gang.is_hung = gang.is_finishing = False  # a Job that was suspended has other pods now
            if self.saved(gang).result is not None or self.is_obedient:
                self._cluster.later(1.0, 20.0, self.finish, gang)

    def work(self, gang: Gang, steps: int, *, saves: bool) -> None:
        """Steps are done; some checkpoint later is saved."""
        spent = self._cluster.api.clock() - gang.began - sum(gang.seconds.values())
        gang.seconds["training"] = gang.seconds.get("training", 0.0) + max(0.0, spent * 0.9)
        gang.seconds["dataWait"] = gang.seconds.get("dataWait", 0.0) + max(0.0, spent * 0.1)
        gang.step = min(STEPS, gang.step + steps)
        if saves:
            self.saved(gang).step = gang.step

    def restart_in_place(self, gang: Gang) -> None:
        """The ranks start again from the checkpoint; the pods stay."""
        gang.step = self.saved(gang).step

    def finish(self, gang: Gang, *, says_result: bool = True) -> None:
        """Its result is on the storage; then its workers end, one after the other."""
        if gang.is_hung or gang.is_finishing or not self._is_whole(gang):
            return
        gang.is_finishing = True
        saved, document = self.saved(gang), gang.document
        is_found = saved.result is not None
        saved.result = saved.result or self._result(gang)
        words = asdict(saved.result) | {"reused": is_found, "attempt": document.attempt}
        for pod in self.running(gang):
            own = {"result": words} if says_result and self._is_first(pod) else {}
            self._cluster.later(
                0.0, 2.0, self._end, pod["metadata"]["uid"], ExitCode.OK, json.dumps({"exit_code": 0} | own)
            )

    def crash(self, pod: Object, code: int, *, reason: str = "Error", message: str | None = None) -> None:
        """One worker ends badly; its peers notice, or hang."""
        words = Termination(exit_code=code, rank=0, message=f"exit {code}", traceback="Traceback: …")
        said = json.dumps(asdict(words)) if message is None else message
        self._end(pod["metadata"]["uid"], code, said, reason)
        self.lose(pod)

    def lose(self, pod: Object) -> None:
        """It is dead or cut off: the peers wait for it in vain."""
        gang = self.gangs.get(owner_of(pod))
        if gang is not None:
            self._lose_peer(gang, pod)

    def terminate(self, uid: str) -> None:
        """SIGTERM: a worker with enough grace saves a checkpoint."""
        pod = self._cluster.api.find("pods", uid)
        if pod is None:
            return
        if pod["status"]["phase"] != "Running":
            self._cluster.clear(uid)
            return
        gang = self.gangs.get(owner_of(pod))
        grace = float(pod["metadata"]["deletionGracePeriodSeconds"])
        needs = self._cluster.rng.uniform(0.2, 8.0)
        if gang is not None and not gang.is_hung and needs <= grace and self._is_whole(gang):
            self._save_and_stop(gang, needs)
            return
        code = self._cluster.rng.choice([int(ExitCode.TERMINATED), 137])
        message = "" if code == 137 else json.dumps({"exit_code": code, "message": "SIGTERM"})
        self._cluster.later(grace, grace, self._end, uid, code, message)
        if gang is not None:
            self._lose_peer(gang, pod)

    def _save_and_stop(self, gang: Gang, seconds: float) -> None:
        """All ranks agree on it."""
        if gang.is_finishing:
            return
        gang.is_finishing = True
        self.saved(gang).step = gang.step
        words = json.dumps({"exit_code": int(ExitCode.PREEMPTED), "message": "saved"})
        for pod in self.running(gang):
            self._cluster.later(
                seconds, seconds + 1.0, self._end, pod["metadata"]["uid"], int(ExitCode.PREEMPTED), words
            )

    def read(self, ip: str) -> Progress | None:
        """What /progress answers at an address."""
        found = (p for p in self._cluster.api.all("pods") if p["status"].get("podIP") == ip)
        pod = next(found, None)
        gang = None if pod is None else self.gangs.get(owner_of(pod))
        if pod is None or gang is None or pod["status"]["phase"] != "Running" or not gang.began:
            return None
        saved = self.saved(gang).step
        return Progress(
            attempt=gang.document.attempt,
            phase="running",
            step=gang.step,
            steps=STEPS,
            tokens=gang.step * 4096,
            eta_seconds=float(STEPS - gang.step),
            metrics={"loss": 1.0 + 1.0 / (1 + gang.step)},
            checkpoint=Checkpoint(step=saved, path=f"{gang.document.output}/checkpoints/{saved}") if saved else None,
            seconds=dict(gang.seconds),
            time=self._cluster.api.clock(),
        )

    def _result(self, gang: Gang) -> Result:
        document = gang.document
        return Result(
            stage=document.stage,
            kind=document.kind,
            digest=document.digest,
            attempt=document.attempt,
            output=document.output.removeprefix(f"{document.storage}/"),
            steps=STEPS,
            seconds=100.0,
            metrics={"heldOutLoss": 1.5},
        )

    def _is_whole(self, gang: Gang) -> bool:
        job = self._cluster.api.find("jobs", gang.job)
        nodes = self._cluster.nodes
        alive = [p for p in self.running(gang) if nodes[p["spec"]["nodeName"]].silent_since is None]
        return job is not None and len(alive) == job["spec"]["completions"]

    def _is_first(self, pod: Object) -> bool:
        return bool(pod["metadata"]["labels"][names.LABEL_COMPLETION_INDEX] == "0")

    def _lose_peer(self, gang: Gang, lost: Object) -> None:
        if gang.is_hung or gang.is_finishing:
            return
        gang.is_hung = True
        self._cluster.later(_STALL_SECONDS, _STALL_SECONDS + 60, self._give_up, gang)
        for pod in self.running(gang):
            if pod["metadata"]["uid"] != lost["metadata"]["uid"] and self._cluster.rng.random() < 0.7:
                words = json.dumps({"exit_code": int(ExitCode.PEER_LOST), "message": "a peer is gone"})
                self._cluster.later(0.1, 5.0, self._end, pod["metadata"]["uid"], int(ExitCode.PEER_LOST), words)

    def _give_up(self, gang: Gang) -> None:
        """The worker's own watchdog."""
        for pod in self.running(gang):
            self._end(
                pod["metadata"]["uid"], int(ExitCode.STALLED), json.dumps({"exit_code": 68, "message": "stalled"})
            )

    def _end(self, uid: str, code: int, message: str, reason: str = "") -> None:
        pod = self._cluster.api.find("pods", uid)
        if pod is None or pod["status"]["phase"] != "Running":
            return
        finished = self._cluster.api.stamp()
        self._cluster.when_heard(pod, lambda: self._report(uid, int(code), message, reason, finished))

    def _report(self, uid: str, code: int, message: str, reason: str, finished: str) -> None:
        pod = self._cluster.api.find("pods", uid)
        if pod is None or pod["status"]["phase"] != "Running":
            return
        labels = pod["metadata"]["labels"]
        self.exits.append((owner_of(pod), labels[names.LABEL_STAGE], int(labels[names.LABEL_ATTEMPT]), code))
        why = reason or ("Completed" if code == 0 else "Error")
        state = {"exitCode": code, "reason": why, "message": message, "finishedAt": finished}
        phase = "Succeeded" if code == 0 else "Failed"
        conditions = [c | {"status": "False"} if c["type"] == "Ready" else c for c in pod["status"]["conditions"]]
        self._cluster.set_container(pod, {"terminated": state}, phase=phase, conditions=conditions)
        if "deletionTimestamp" in pod["metadata"]:
            self._cluster.later(0.0, 0.5, self._cluster.clear, uid)
