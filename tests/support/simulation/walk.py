"""A random walk, drawn from a seed: a whole operator lives through faults and edits in a simulated cluster.

`steps.py` and `users.py` have what may happen, the modules of invariants what must hold whatever happens.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from sailvl_operator.api.status import Status
from sailvl_operator.api.types import Defaults
from sailvl_operator.cluster.progress import ProgressReader
from tests.support.apiserver.objects import Object, is_active
from tests.support.apiserver.requests import InMemoryApiServer
from tests.support.apiserver.store import NEW_YEAR_2026, ObjectWrite
from tests.support.operator_process import OperatorProcess
from tests.support.simulation.client import ProgressEndpoints, SimulatedClient
from tests.support.simulation.clock import run_in_virtual_time
from tests.support.simulation.cluster import NAMESPACE, SimulatedCluster
from tests.support.simulation.cluster_invariants import CONTINUOUS_INVARIANTS, QUIESCENT_INVARIANTS
from tests.support.simulation.invariants import InvariantChecker
from tests.support.simulation.network import Network, OperatorConnection
from tests.support.simulation.steps import STEPS
from tests.support.simulation.users import create_run, remove_obstacles
from tests.support.simulation.workers import Gang

DRAIN_SECONDS = 1500.0
"""Time without faults after which nothing is under way any more."""
QUIESCENT_SECONDS = 200.0
"""Time in which nothing may be written afterwards; spent twice."""
FINAL_SECONDS = 40_000.0
"""Time in which a run must finish once nothing keeps it from succeeding."""
BACKLOG_INTERVAL_SECONDS, BACKLOG_SECONDS = 100.0, 20.0
"""How often, and for how long, the operator defers writes as under a startup backlog."""
_HISTORY_LINES = 60
_PAUSES = ((0.0, 6), (0.02, 3), (0.3, 4), (3.0, 5), (12.0, 4), (45.0, 2), (150.0, 1))
"""Maximum seconds between two steps, with their weights."""


class WalkError(AssertionError):
    """An invariant is violated, or the operator failed; the message shows how to repeat the walk."""


class RandomWalk:
    """One simulated cluster and the walk through its states."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.clock_offset_seconds = 0.0
        self.steps_taken = 0
        self.history: deque[str] = deque(maxlen=_HISTORY_LINES)
        self.api = InMemoryApiServer(clock=self.clock, has_kubelets=True)
        self.cluster = SimulatedCluster(self.api, self.rng)
        self.network = Network(self.api, self.rng)
        self.invariants = InvariantChecker(api=self.api, monotonic=lambda: asyncio.get_running_loop().time())
        self.operator: OperatorProcess | None = None
        self.connection: OperatorConnection | None = None
        self.operator_count = 0
        self.operator_writes = 0
        self.errors: list[str] = []
        self.api.observers += [self._record_write, self.invariants.observe]

    def clock(self) -> float:
        """Return the wall-clock time, which the walk can make jump."""
        return NEW_YEAR_2026 + asyncio.get_running_loop().time() + self.clock_offset_seconds

    @property
    def run(self) -> Object | None:
        """The run, if it exists now."""
        return self.api.get("sailvlruns", NAMESPACE, "demo")

    @property
    def status(self) -> Status:
        """The run's status; empty without a run."""
        return msgspec.convert((self.run or {}).get("status") or {}, Status)

    def _record_write(self, write: ObjectWrite) -> None:
        if write.plural == "events":
            return
        is_by_operator = write.by in self.invariants.operators
        self.operator_writes += is_by_operator
        if is_by_operator or write.plural in ("sailvlruns", "jobs") or write.verb in ("remove", "delete"):
            status = _describe_status(write) if write.plural == "sailvlruns" else ""
            self.history.append(f"{self.clock() - NEW_YEAR_2026:10.2f}      {write}{status}")

    # The operator's processes.

    def start_operator(self) -> None:
        """Start a new operator process with an empty memory."""
        self.operator_count += 1
        name = f"operator-{self.operator_count}"
        self.invariants.operators.add(name)
        skew = self.rng.choice([0.0, 0.0, self.rng.uniform(-2.0, 2.0)])
        self.connection = OperatorConnection(self.network, operator=name)
        self.operator = OperatorProcess(
            SimulatedClient(self.connection),
            defaults=Defaults(image="trainer:test"),
            clock=lambda: self.clock() + skew,
            monotonic=asyncio.get_running_loop().time,
            read_progress=self._read_progress,
            has_backpressure=lambda: asyncio.get_running_loop().time() % BACKLOG_INTERVAL_SECONDS < BACKLOG_SECONDS,
        )
        self.operator.start()
        self._reaper = asyncio.ensure_future(self._reap(self.connection))

    async def _reap(self, connection: OperatorConnection) -> None:
        """Kill an operator that died at one of its writes, so that its other tasks end, too."""
        await connection.has_died.wait()
        self._record("the operator dies")
        assert self.operator is not None
        operator, self.operator, self.connection = self.operator, None, None
        await operator.kill()

    async def _read_progress(self, reader: ProgressReader) -> None:
        await reader.read_due(ProgressEndpoints(self.cluster.workers, self.rng))  # type: ignore[arg-type]

    async def kill_operator(self) -> None:
        """End the operator process, if there is one, without any cleanup."""
        if self.operator is not None:
            self._reaper.cancel()
            operator, self.operator, self.connection = self.operator, None, None
            await operator.kill()

    # The walk.

    async def take_steps(self, number: int) -> None:
        """Take drawn steps, then require that the run finishes.

        Raises:
            WalkError: An invariant is violated or the operator logs an error.
        """
        asyncio.get_running_loop().set_exception_handler(self._record_exception)
        handler = _ErrorCollector(self.errors)
        logging.getLogger("sailvl_operator").addHandler(handler)
        try:
            self.start_operator()
            for self.steps_taken in range(1, number + 1):
                await self._take_step()
            await self._finish_run()
        finally:
            logging.getLogger("sailvl_operator").removeHandler(handler)
            await self.kill_operator()

    async def _take_step(self) -> None:
        description = ""
        while not description:
            step = self.rng.choices(*zip(*STEPS, strict=True))[0]
            result = step(self)
            description = result if isinstance(result, str) else await result
        self._record(f"{step.__name__.replace('_', ' ')}: {description}")
        longest = self.rng.choices([seconds for seconds, _ in _PAUSES], [weight for _, weight in _PAUSES])[0]
        await self.pass_time(self.rng.uniform(0.0, longest))

    async def pass_time(self, seconds: float) -> None:
        """Wait, then check the operator and the invariants."""
        await asyncio.sleep(seconds)
        if self.operator is not None:
            self.operator.check()
        else:
            self.invariants.overlapping_since.clear()  # a transition lasts until an operator runs again
        self._check_invariants(CONTINUOUS_INVARIANTS)

    def _check_invariants(self, invariants: tuple[Callable[[InvariantChecker], None], ...]) -> None:
        for invariant in invariants:
            self.invariants.check(invariant, self.invariants)
        violations = self.invariants.violations + self.errors
        if violations:
            raise WalkError(self._explain(violations[0]))

    def _explain(self, problem: str) -> str:
        repeat = f"SAILVL_WALK_SEED={self.seed} SAILVL_WALK_STEPS={self.steps_taken}"
        tail = "\n".join(self.history)
        return f"{problem}\n\nseed {self.seed}, step {self.steps_taken}; repeat: {repeat} pytest -k long_walk\n{tail}"

    def _record(self, text: str) -> None:
        self.history.append(f"{self.clock() - NEW_YEAR_2026:10.2f} {self.steps_taken:4d} {text}")

    def _record_exception(self, _: object, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    # The end of a walk.

    async def check_quiescence(self) -> None:
        """Stop all faults and wait; then require that nothing is under way and that the operator writes nothing."""
        self._stop_faults()
        for _ in range(6):
            await self.pass_time(DRAIN_SECONDS / 6)
        self._record("nothing is under way")
        self._check_invariants(QUIESCENT_INVARIANTS)
        writes, version = self.operator_writes, self.api.version
        await self.pass_time(QUIESCENT_SECONDS)
        if self.operator is not None and self.run is not None:
            self.operator.queue.add((NAMESPACE, "demo"))
        await self.pass_time(QUIESCENT_SECONDS)
        if self.operator_writes != writes and self.api.version != version:
            raise WalkError(self._explain(f"{self.operator_writes - writes} writes although nothing happened"))

    def _stop_faults(self) -> None:
        self.network.conditions.reset()
        self.cluster.is_full = self.cluster.is_image_missing = False
        for node in self.cluster.nodes.values():
            if node.unreachable_since is not None:
                self.cluster.reconnect(node)
        if self.operator is None:
            self.start_operator()
        assert self.connection is not None
        self.connection.never_die()

    async def _finish_run(self) -> None:
        """Stop faults and let workers succeed; require that the run ends, in success or for a reason of the walk."""
        self._record("no more faults")
        self._stop_faults()
        if self.run is None or "deletionTimestamp" in self.run["metadata"]:
            await self.pass_time(200.0)
            create_run(self)
        self.edit_spec(remove_obstacles)
        self.edit_spec(lambda spec: spec.update(suspend=False))
        self.cluster.workers.succeed_from_now_on()
        until = asyncio.get_running_loop().time() + FINAL_SECONDS
        while self.run is not None and not self.status.is_finished:  # the run may have been deleted after its TTL
            if asyncio.get_running_loop().time() > until:
                raise WalkError(self._explain(f"nothing blocks the run, but it doesn't finish: {self.status}"))
            await self.pass_time(60.0)
        await self.check_quiescence()
        self._check_exit_codes()

    def _check_exit_codes(self) -> None:
        for stage in self.status.stages:
            last = stage.last_failure
            if stage.state == "Failed" and last is not None and last.exit_code is not None:
                exits = {(name, number, code) for _, name, number, code in self.cluster.workers.exits}
                if (stage.name, last.attempt, last.exit_code) not in exits:
                    raise WalkError(self._explain(f"no worker exited as {last} reports"))

    # Helpers of the steps.

    def edit_spec(self, mutate: Callable[[dict[str, Any]], None]) -> None:
        """Change the run's spec as a user."""
        assert self.run is not None
        self.api.update("sailvlruns", self.run, lambda new: mutate(new["spec"]), by="a user")

    def draw_pod(self, is_candidate: Callable[[Object], bool] = is_active) -> Object | None:
        """Return one of the candidates that are not being deleted, or None."""
        found = [
            p for p in self.api.list_objects("pods") if is_candidate(p) and "deletionTimestamp" not in p["metadata"]
        ]
        return self.rng.choice(found) if found else None

    def draw_gang(self) -> Gang | None:
        """Return one of the gangs that make progress, or None."""
        found = self.cluster.workers.list_working()
        return self.rng.choice(found) if found else None


class _ErrorCollector(logging.Handler):
    """Collects the errors that the operator logs."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        self._errors.append(logging.Formatter().format(record))


def _describe_status(write: ObjectWrite) -> str:
    status = msgspec.convert(write.object.get("status") or {}, Status)
    stages = ", ".join(f"{s.name} {s.state} {s.attempt}" for s in status.stages if s.state != "Pending")
    true = ", ".join(f"{c.type}: {c.reason}" for c in status.conditions if c.status == "True")
    return f" generation {write.object['metadata']['generation']}: {stages}; {true}"


def run_walk(seed: int, steps: int) -> RandomWalk:
    """Run a whole walk in virtual time and return it; the same seed gives the same walk.

    Raises:
        WalkError: An invariant is violated or the operator logs an error.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        walk = RandomWalk(seed)
        run_in_virtual_time(walk.take_steps(steps))
    finally:
        random.setstate(state)
    return walk
