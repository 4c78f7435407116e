"""A random walk of a whole operator through a model of its cluster, drawn from a seed.

`walk_steps.py` has what may happen on the way, `run_laws.py` what must hold whatever happens.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from sailvl_operator.api.defaults import Defaults
from sailvl_operator.api.status import Status
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.settings import ApiSettings
from tests.support.operator_process import OperatorProcess
from tests.support.simulation.api import ModelApi, Object, Write, may_run
from tests.support.simulation.clock import run_virtually
from tests.support.simulation.cluster import NAMESPACE, Cluster
from tests.support.simulation.invariants import QUIET_LAWS, WORLD_LAWS, Ledger
from tests.support.simulation.network import Weather, Wire
from tests.support.simulation.steps import STEPS
from tests.support.simulation.users import create_the_run, mend
from tests.support.simulation.workers import Gang

EPOCH = 1_767_225_600.0
CALM_SECONDS, QUIET_SECONDS = 1500.0, 200.0
"""Until nothing is under way any more; and how long nothing is written then."""
FINALE_SECONDS = 40_000.0
RUSH_EVERY, RUSH_SECONDS = 100.0, 20.0
"""In which the control plane is busy for others: writes that can wait do so."""
_TAIL = 60
_DWELL = ((0.0, 6), (0.02, 3), (0.3, 4), (3.0, 5), (12.0, 4), (45.0, 2), (150.0, 1))
"""Seconds between steps, at most, and how often."""


class LostError(AssertionError):
    """The walk found what must not be."""


class NoCredentials:
    """The model asks nobody who he is."""

    server = "http://model"
    ssl = None

    async def headers(self) -> dict[str, str]:
        return {}

    def forget(self) -> None:
        pass


class ModelClient(Client):
    """The operator's own client; a wire lies where it would open a session."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(NoCredentials(), ApiSettings(page_size=3), lambda _verb, _code: None)
        self._session = wire


class ProgressAnswer:
    """What a GET of /progress gives, in place of an aiohttp session and of its response."""

    def __init__(self, walk: Walk, body: bytes = b"", status: int = 200) -> None:
        self._walk, self._body, self.status = walk, body, status

    def get(self, url: str, **_: Any) -> ProgressAnswer:
        found = self._walk.cluster.workers.read(url.split("/")[2].partition(":")[0])
        if found is None or self._walk.rng.random() < 0.1:
            return ProgressAnswer(self._walk, status=503)
        return ProgressAnswer(self._walk, msgspec.json.encode(found))

    async def __aenter__(self) -> ProgressAnswer:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    @property
    def content(self) -> ProgressAnswer:
        return self

    async def iter_any(self) -> Any:
        yield self._body


class Walk:
    """One world and its walk."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.jumped = 0.0
        self.taken = 0
        self.history: deque[str] = deque(maxlen=_TAIL)
        self.api = ModelApi(clock=self.clock, rng=self.rng)
        self.cluster = Cluster(self.api, self.rng)
        self.weather = Weather()
        self.ledger = Ledger(api=self.api, monotonic=lambda: asyncio.get_running_loop().time())
        self.operator: OperatorProcess | None = None
        self.wire: Wire | None = None
        self.lives = 0
        self.writes = 0
        self.errors: list[str] = []
        self.api.observers += [self._note, self.ledger.see]

    def clock(self) -> float:
        return EPOCH + asyncio.get_running_loop().time() + self.jumped

    @property
    def run(self) -> Object | None:
        return self.api.get("sailvlruns", NAMESPACE, "demo")

    @property
    def status(self) -> Status:
        return msgspec.convert((self.run or {}).get("status") or {}, Status)

    def _note(self, write: Write) -> None:
        if write.plural == "events":
            return
        is_ours = write.by in self.ledger.operators
        self.writes += is_ours
        if is_ours or write.plural in ("sailvlruns", "jobs") or write.verb in ("remove", "delete"):
            said = _describe(write) if write.plural == "sailvlruns" else ""
            self.history.append(f"{self.clock() - EPOCH:10.2f}      {write}{said}")

    # The operator's lives.

    def start(self) -> None:
        self.lives += 1
        name = f"operator-{self.lives}"
        self.ledger.operators.add(name)
        skew = self.rng.choice([0.0, 0.0, self.rng.uniform(-2.0, 2.0)])
        self.wire = Wire(self.api, self.weather, self.rng, name=name)
        self.operator = OperatorProcess(
            ModelClient(self.wire),
            defaults=Defaults(image="trainer:test"),
            clock=lambda: self.clock() + skew,
            monotonic=asyncio.get_running_loop().time,
            read_progress=self._read_progress,
            has_backpressure=lambda: asyncio.get_running_loop().time() % RUSH_EVERY < RUSH_SECONDS,
        )
        self.operator.start()
        self._reaper = asyncio.ensure_future(self._reap(self.wire))

    async def _reap(self, wire: Wire) -> None:
        """A process that has died does nothing more."""
        await wire.death.wait()
        self._say("the operator dies")
        assert self.operator is not None
        operator, self.operator, self.wire = self.operator, None, None
        await operator.kill()

    async def _read_progress(self, reader: ProgressReader) -> None:
        await reader.read_due(ProgressAnswer(self))  # type: ignore[arg-type]

    async def end(self) -> None:
        if self.operator is not None:
            self._reaper.cancel()
            operator, self.operator, self.wire = self.operator, None, None
            await operator.kill()

    # The walk.

    async def go(self, steps: int) -> None:
        """Raises LostError, with all that is needed to walk there again."""
        asyncio.get_running_loop().set_exception_handler(self._note_error)
        handler = _Errors(self.errors)
        logging.getLogger("sailvl_operator").addHandler(handler)
        try:
            self.start()
            for self.taken in range(1, steps + 1):
                await self._step()
            await self.finale()
        finally:
            logging.getLogger("sailvl_operator").removeHandler(handler)
            await self.end()

    async def _step(self) -> None:
        said = ""
        while not said:
            act = self.rng.choices(*zip(*STEPS, strict=True))[0]
            done = act(self)
            said = done if isinstance(done, str) else await done
        self._say(f"{act.__name__.replace('_', ' ')}: {said}")
        dwell = self.rng.choices([d for d, _ in _DWELL], [w for _, w in _DWELL])[0]
        await self.pass_time(self.rng.uniform(0.0, dwell))

    async def pass_time(self, seconds: float) -> None:
        """And see whether all is as it must be."""
        await asyncio.sleep(seconds)
        if self.operator is not None:
            self.operator.check()
        for law in WORLD_LAWS:
            self.ledger.check(law, self.ledger)
        self.look()

    def look(self) -> None:
        broken = self.ledger.broken + self.errors
        if broken:
            raise LostError(self.explain(broken[0]))

    def explain(self, what: str) -> str:
        again = f"SAILVL_WALK_SEED={self.seed} SAILVL_WALK_STEPS={self.taken}"
        tail = "\n".join(self.history)
        return f"{what}\n\nseed {self.seed}, step {self.taken}; again: {again} pytest -k longer_walk\n{tail}"

    def _say(self, words: str) -> None:
        self.history.append(f"{self.clock() - EPOCH:10.2f} {self.taken:4d} {words}")

    def _note_error(self, _: object, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    # Ends.

    async def calm(self) -> None:
        """All faults stop. Then nothing is under way after a while, and nothing is written any more."""
        self.clear_up()
        for _ in range(6):
            await self.pass_time(CALM_SECONDS / 6)
        self._say("all is quiet")
        for law in QUIET_LAWS:
            self.ledger.check(law, self.ledger)
        self.look()
        before, version = self.writes, self.api.version
        await self.pass_time(QUIET_SECONDS)
        if self.operator is not None and self.run is not None:
            self.operator.queue.add((NAMESPACE, "demo"))
        await self.pass_time(QUIET_SECONDS)
        if self.writes != before and self.api.version != version:
            raise LostError(self.explain(f"{self.writes - before} writes though nothing happened"))

    def clear_up(self) -> None:
        self.weather.clear_up()
        self.cluster.is_full = self.cluster.is_image_gone = False
        for node in self.cluster.nodes.values():
            if node.silent_since is not None:
                self.cluster.bring_back(node)
        if self.operator is None:
            self.start()
        assert self.wire is not None
        self.wire.die_at_write(1_000_000, before=True)

    async def finale(self) -> None:
        """Faults stop, workers succeed: the run ends, well or for a reason that the walk gave it."""
        self._say("the finale")
        self.clear_up()
        if self.run is None or "deletionTimestamp" in self.run["metadata"]:
            await self.pass_time(200.0)
            create_the_run(self)
        self.edit(mend)
        self.edit(lambda spec: spec.update(suspend=False))
        self.cluster.workers.obey()
        until = asyncio.get_running_loop().time() + FINALE_SECONDS
        while self.run is not None and not self.status.is_finished:  # its time to live may have ended
            if asyncio.get_running_loop().time() > until:
                raise LostError(self.explain(f"nothing stands in the way, and the run doesn't end: {self.status}"))
            await self.pass_time(60.0)
        await self.calm()
        self._check_reason()

    def _check_reason(self) -> None:
        for stage in self.status.stages:
            last = stage.last_failure
            if stage.state == "Failed" and last is not None and last.exit_code is not None:
                seen = {(name, number, code) for _, name, number, code in self.cluster.workers.exits}
                if (stage.name, last.attempt, last.exit_code) not in seen:
                    raise LostError(self.explain(f"no worker ended as {last} says"))

    # What the actions use.

    def edit(self, mutate: Callable[[dict[str, Any]], None]) -> str:
        """A person edits the spec."""
        assert self.run is not None
        return str(self.api.change("sailvlruns", self.run, lambda new: mutate(new["spec"]), by="a person")["spec"])

    def pod(self, is_fit: Callable[[Object], bool] = may_run) -> Object | None:
        """Any that fits."""
        found = [p for p in self.api.all("pods") if is_fit(p) and "deletionTimestamp" not in p["metadata"]]
        return self.rng.choice(found) if found else None

    def gang(self) -> Gang | None:
        found = self.cluster.workers.whole()
        return self.rng.choice(found) if found else None


class _Errors(logging.Handler):
    """The operator's own faults."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(logging.Formatter().format(record))


def _describe(write: Write) -> str:
    status = msgspec.convert(write.object.get("status") or {}, Status)
    stages = ", ".join(f"{s.name} {s.state} {s.attempt}" for s in status.stages if s.state != "Pending")
    true = ", ".join(f"{c.type}: {c.reason}" for c in status.conditions if c.status == "True")
    return f" generation {write.object['metadata']['generation']}: {stages}; {true}"


def walk_along(seed: int, steps: int) -> Walk:
    """A whole walk; raises LostError."""
    state = random.getstate()
    random.seed(seed)
    try:
        walk = Walk(seed)
        run_virtually(walk.go(steps))
    finally:
        random.setstate(state)
    return walk
