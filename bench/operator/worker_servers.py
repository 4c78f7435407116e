"""Servers that answer the operator's requests to /progress for all fake pods of an address: honest and hostile ones."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import zlib
from dataclasses import asdict

from aiohttp import web

from sailvl_trainer.contract import METRICS_PORT, Progress

SLOW_SECONDS = 1.9
"""Delay of slow answers, just below the operator's timeout of a read."""
_REQUIRED = b'"attempt":1,"phase":"running"'


class HonestWorkers:
    """Server that answers as a worker of no attempt does, so that each progress is read and changes nothing."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._runner: web.AppRunner | None = None
        self.reads = 0
        """Requests to /progress so far."""

    async def start(self) -> None:
        """Start to listen.

        Raises RuntimeError if the address could not be added to this machine, or if another benchmark uses it.
        """
        _set_address("replace", self._address)
        app = web.Application()
        app.router.add_get("/progress", self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._address, METRICS_PORT).start()
        except OSError as error:
            await runner.cleanup()
            raise RuntimeError(
                f"fake pods share the address {self._address}, which can't be used; run this as root, and one "
                f"benchmark at a time: {error}"
            ) from error
        self._runner = runner

    async def stop(self) -> None:
        """Stop listening, and remove the address, unless it could not be used."""
        if self._runner is not None:
            await self._runner.cleanup()
            _set_address("delete", self._address)

    async def _answer(self, _: web.Request) -> web.Response:
        self.reads += 1
        return web.json_response(asdict(Progress(attempt=0, phase="running")))


class HostileWorkers:
    """Server that gives each kind of hostile answer in turn."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._answers = itertools.cycle(build_answers())
        self._server: asyncio.Server | None = None
        self.reads = 0
        """Requests so far."""
        self.slow_answers = 0
        """Delayed answers that were sent, so far."""

    async def start(self) -> None:
        """Start to listen."""
        _set_address("replace", self._address)
        self._server = await asyncio.start_server(self._answer, self._address, METRICS_PORT, backlog=4096)

    async def stop(self) -> None:
        """Stop listening, and remove the address."""
        if self._server is not None:
            self._server.close()
            _set_address("delete", self._address)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            self.reads += 1
            delay_seconds, response = next(self._answers)
            await asyncio.sleep(delay_seconds)
            writer.write(response)
            await writer.drain()
            self.slow_answers += delay_seconds > 0
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()


def build_answers() -> list[tuple[float, bytes]]:
    """Return pairs of a delay in seconds and the bytes of a response, one for each kind of hostile worker."""
    metrics = b",".join(b'"m%04d":%d' % (n, n) for n in range(4000))
    bodies = [
        b"{" + _REQUIRED + b',"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b"{" + _REQUIRED + b',"metrics":{"\xff\xfe":1}}',
        b"{" + _REQUIRED + b',"step":' + b"9" * 400 + b',"steps":-1}',
        b"{" + _REQUIRED + b',"metrics":{' + metrics + b"}}",
        b"{" + _REQUIRED + b',"metrics":{"' + b"n" * 60_000 + b'":1}}',
    ]
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(64)) + bomb.flush()
    slow = [(SLOW_SECONDS, _build_response(b"{" + _REQUIRED + b',"step":%d}' % n)) for n in range(3)]
    answers = [(0.0, _build_response(body)) for body in bodies] + slow
    answers.append((0.0, _build_response(packed, b"Content-Encoding: gzip\r\n")))
    answers.append((0.0, b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n"))
    answers.append((0.0, b"\x00\xff\x13garbage\r\n\r\n"))
    return answers


def _build_response(body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _set_address(verb: str, address: str) -> None:
    subprocess.run(["ip", "address", verb, f"{address}/32", "dev", "lo"], capture_output=True, check=False)
