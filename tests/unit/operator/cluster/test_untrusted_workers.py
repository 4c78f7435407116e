"""Reader of /progress against workers that answer with anything, slowly or never."""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import aiohttp
import pytest
from msgspec.structs import replace

from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.cluster.readable_pods import find_readable, is_worker_address
from sailvl_operator.cluster.runs import RunStore
from sailvl_operator.core.observe import PodRecord
from tests.support.builders.operator import build_document, build_job, build_pod
from tests.support.fuzz import draw_generators, mutate_bytes

OK = b'"attempt":1,"phase":"running"'


def build_answer(body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def compress(size: int, window_bits: int) -> bytes:
    """Return `size` zeros, compressed."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, window_bits)
    return b"".join(compressor.compress(bytes(2**20)) for _ in range(size >> 20)) + compressor.flush()


ANSWERS = {
    "nested too deeply": build_answer(b"{" + OK + b',"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}"),
    "key that is not UTF-8": build_answer(b"{" + OK + b',"metrics":{"\xff\xfe":1}}'),
    "invalid Content-Length": b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\n{}",
    "not HTTP": b"\x00\xff\x13garbage\r\n\r\n",
    "header of a megabyte": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "100,000 headers": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 100_000 + b"\r\n",
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest\r\nContent-Length: 0\r\n\r\n",
    "broken redirect": b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n",
    "switched protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n{" + OK + b"}",
    "endless continue": b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
    "huge chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFFFF\r\n{}",
    "negative chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n{}",
    "integer of 400 digits": build_answer(b"{" + OK + b',"step":' + b"9" * 400 + b"}"),
    "gzip bomb": build_answer(compress(2**25, 31), b"Content-Encoding: gzip\r\n"),
    "deflate bomb": build_answer(compress(2**25, 15), b"Content-Encoding: deflate\r\n"),
    "no answer": b"",
}
COOKIE = b"Set-Cookie: \xff\xfe=;;;=\r\nSet-Cookie: a=b; expires=Foo, 99-Foo-99999999999 00:00:00 GMT\r\n"


@asynccontextmanager
async def serve_answer(answer: Callable[[], bytes], delay_seconds: float = 0.0) -> AsyncIterator[int]:
    """Serve an answer to every request on loopback, after a delay; yield the port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(delay_seconds)
            writer.write(answer())
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
    async with server:
        yield server.sockets[0].getsockname()[1]


class Reading:
    """A reader of some pods on loopback, and what it reported."""

    def __init__(
        self, pods: list[PodRecord], port: int, *, interval_seconds: float = 5.0, timeout_seconds: float = 1.0
    ):
        self.outcomes: list[str] = []
        self.errors: list[str] = []
        self.reader = ProgressReader(
            interval_seconds=interval_seconds,
            timeout_seconds=timeout_seconds,
            pods=lambda: pods,
            on_change=lambda _: None,
            count=self.outcomes.append,
            count_error=self.errors.append,
            port=port,
            may_read=lambda _: True,
        )

    async def read(self) -> None:
        async with self.reader.build_session() as session:
            await self.reader.read_due(session)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.reader.run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def build_pods(namespace: str, count: int) -> list[PodRecord]:
    """Build the first workers of as many runs of a namespace."""
    pod = replace(build_pod("curate", ip="127.0.0.1"), namespace=namespace, run_uid="u")
    return [replace(pod, uid=f"{namespace}-{n}", name=f"r{n}-curate-1-0", run=f"r{n}") for n in range(count)]


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", ANSWERS)
async def test_reader_survives_any_answer_and_counts_it_as_failed(name):
    async with serve_answer(lambda: ANSWERS[name]) as port:
        reading = Reading(build_pods("team", 1), port, interval_seconds=0.01, timeout_seconds=0.5)
        async with reading.run() as task:
            await wait_until(lambda: len(reading.outcomes) >= 2)
            assert not task.done()
    assert set(reading.outcomes) == {"failed"}
    assert reading.errors == [], "every failure is an expected one"


@pytest.mark.parametrize("headers", [COOKIE, b"Content-Encoding: br\r\n", b"Content-Type: x; charset=\xff\r\n"])
async def test_unneeded_headers_are_ignored(headers):
    async with serve_answer(lambda: build_answer(b"{" + OK + b"}", headers)) as port:
        reading = Reading(build_pods("team", 1), port)
        await reading.read()
    assert reading.outcomes == ["ok"]


async def test_unexpected_error_is_counted_and_costs_one_pod_alone(monkeypatch):
    async with serve_answer(lambda: build_answer(b"{" + OK + b"}")) as port:
        reading = Reading(build_pods("team", 3), port)
        fetch = reading.reader._fetch
        failures = iter([RuntimeError("unforeseen")])

        async def fail_once(session: aiohttp.ClientSession, ip: str) -> object:
            for failure in failures:
                raise failure
            return await fetch(session, ip)

        monkeypatch.setattr(reading.reader, "_fetch", fail_once)
        await reading.read()
    assert Counter(reading.outcomes) == {"ok": 2, "failed": 1}
    assert reading.errors == ["progress"]


@pytest.mark.fuzz
async def test_reader_survives_mutated_answers():
    seeds = [answer for answer in ANSWERS.values() if len(answer) < 100_000]
    answer = b""
    async with serve_answer(lambda: answer) as port:
        reading = Reading(build_pods("team", 1), port, timeout_seconds=0.3)
        async with reading.reader.build_session() as session:
            for generator in draw_generators(40):
                answer = mutate_bytes(generator.choice(seeds), generator)
                reading.reader._schedules.clear()
                await reading.reader.read_due(session)
                assert reading.errors == [], f"SAILVL_FUZZ_SEED={generator.number}: {answer[:200]!r}"
    assert len(reading.outcomes) >= 40


class Workers:
    """Workers in place of an HTTP session: those of 192.0.2.1 answer when `release` is set, others at once."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.fast_reads = 0

    @asynccontextmanager
    async def get(self, url: str, **_: object) -> AsyncIterator[SimpleNamespace]:
        if "192.0.2.1" in url:
            await self.release.wait()
        else:
            self.fast_reads += 1
        yield SimpleNamespace(status=200, content=SimpleNamespace(iter_any=self._stream))

    async def _stream(self) -> AsyncIterator[bytes]:
        yield b"{" + OK + b"}"


async def count_fast_reads(slow_pods: int, *, rounds: int = 6) -> int:
    """Return how often 20 workers are read while those of another namespace answer just before the next round."""
    slow = [replace(pod, ip="192.0.2.1") for pod in build_pods("crowd", slow_pods)]
    fast = [replace(pod, ip="192.0.2.2") for pod in build_pods("fast", 20)]
    now, workers, pods = 0.0, Workers(), slow + fast
    reader = ProgressReader(
        interval_seconds=5.0,
        pods=lambda: pods,
        on_change=lambda _: None,
        count=lambda _: None,
        monotonic=lambda: now,
    )
    for _ in range(rounds):
        now += 5.0
        workers.release.clear()
        reading = asyncio.create_task(reader.read_due(workers))  # type: ignore[arg-type]
        for _ in range(100):
            await asyncio.sleep(0)
        workers.release.set()
        await reading
    return workers.fast_reads


@pytest.mark.parametrize("slow_pods", [60, 1000])
async def test_slow_workers_of_a_namespace_take_no_reads_of_another(slow_pods):
    assert await count_fast_reads(slow_pods) >= 0.9 * await count_fast_reads(0)


async def test_round_does_not_wait_for_the_slowest_read_of_the_last():
    async with serve_answer(lambda: build_answer(b"{" + OK + b"}"), delay_seconds=30) as port:
        pods = build_pods("team", 3)
        reading = Reading(pods, port, interval_seconds=0.05, timeout_seconds=20)
        async with reading.run() as task:
            await wait_until(lambda: len(reading.reader._reads) >= 2)
            assert not task.done()
    assert reading.outcomes == []


def test_write_intervals_are_shared_by_namespaces():
    reader = Reading([], 0).reader
    assert reader.write_interval_seconds("team") == 0.0
    for namespace, runs in (("team", 20), ("crowd", 1000)):
        for number in range(runs):
            reader._documents[namespace, f"r{number}"] = {}
    reader._update_write_intervals()
    assert reader.write_interval_seconds("team") == pytest.approx(5.0)
    assert reader.write_interval_seconds("crowd") == pytest.approx(1000 / 6)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.1.2.3", True),
        ("192.0.2.1", True),
        ("100.64.0.1", True),
        ("240.1.2.3", True),
        ("fd00::1", True),
        ("2001:db8::1", True),
        ("127.0.0.1", False),
        ("127.0.0.77", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("169.254.169.254", False),
        ("::ffff:169.254.169.254", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("0.0.0.0", False),
        ("::", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("localhost", False),
        ("10.1.2.3:80", False),
        ("10.1.2.3/x?", False),
        ("", False),
    ],
)
def test_only_addresses_that_pods_have_are_read(address, expected):
    assert is_worker_address(address) is expected


async def test_pod_with_a_loopback_address_is_not_read():
    async with serve_answer(lambda: build_answer(b"{" + OK + b"}")) as port:
        reading = Reading(build_pods("team", 1), port)
        reading.reader._may_read = is_worker_address
        await reading.read()
    assert reading.outcomes == []


def test_only_pods_of_the_jobs_of_a_run_are_read():
    runs, document = RunStore(), build_document()
    document["metadata"] |= {"uid": "run-uid", "resourceVersion": "1"}
    runs.put(document)
    job = build_job("curate")
    own = replace(build_pod("curate", ip="10.0.0.1"), run_uid="run-uid", owner_uid=job.uid)
    foreign = [
        replace(own, run="other"),
        replace(own, namespace="else"),
        replace(own, owner_uid=""),
        replace(own, owner_uid="other-job"),
        replace(own, index=1),
    ]
    stores = SimpleNamespace(pods=[*foreign, own], jobs=SimpleNamespace(get=lambda key: [job]))
    assert list(find_readable(stores, runs)) == [own]
