"""Reports of workers are untrusted: whatever they hold, the run continues, and its status keeps to the schema."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import strategies as st
from msgspec.structs import replace

from sailvl_operator.api.crd import build_schema
from sailvl_operator.api.status import Cause, decode_status, encode_status
from sailvl_operator.api.untrusted import MAX_COUNT, DocumentError
from sailvl_operator.cluster.merge_patch import drop_nulls
from sailvl_operator.core.reports import MAX_METRICS, MAX_PROGRESS_BYTES, build_terminated, decode_progress
from tests.support.builders.operator import build_result
from tests.support.core_world import CoreWorld, run_to_active_stage
from tests.support.fuzz import fuzz, mutate_bytes

KIB = 1024
DEEP = b"[" * 30_000 + b"]" * 30_000


def encode_progress(**fields: Any) -> bytes:
    return json.dumps({"attempt": 1, "phase": "running", **fields}).encode()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"attempt":1,"phase":"running","x":' + DEEP + b"}", id="nested too deeply"),
        pytest.param(b'{"attempt":1,"phase":"running","metrics":{"\xff\xfe":1}}', id="key that is not UTF-8"),
        pytest.param(b'{"attempt":1,"phase":"running","step":' + b"9" * 400 + b"}", id="integer of 400 digits"),
        pytest.param(b'{"attempt":1,"phase":"running","step":' + b"9" * 5000 + b"}", id="integer of 5,000 digits"),
        pytest.param(encode_progress(step=2**63), id="integer above int64"),
        pytest.param(encode_progress(tokens=-1), id="negative count"),
        pytest.param(encode_progress(phase="\x1b[2J"), id="unknown phase"),
        pytest.param(b'{"attempt":1,"phase":"running","time":1e400}', id="infinite number"),
        pytest.param(b'{"attempt":1,"phase":"running","time":NaN}', id="NaN"),
        pytest.param(encode_progress(seconds={f"activity{n}": 1 for n in range(65)}), id="too many activities"),
        pytest.param(encode_progress(checkpoint={"step": 1, "path": "../other/c"}), id="path out of the storage"),
        pytest.param(encode_progress(checkpoint={"step": 1, "path": "/etc"}), id="absolute path"),
        pytest.param(encode_progress(checkpoint={"step": 1, "path": "c\x1b[2J"}), id="path with control characters"),
        pytest.param(encode_progress(checkpoint={"step": 1, "path": "c" * 1025}), id="path that is too long"),
        pytest.param(encode_progress(checkpoint={"step": -1, "path": "c"}), id="checkpoint of a negative step"),
        pytest.param(b" " * (MAX_PROGRESS_BYTES + 1), id="too large"),
        pytest.param(b"\x00\xff\x13garbage", id="not JSON"),
        pytest.param(b"[]", id="another type"),
        pytest.param(b"", id="empty"),
    ],
)
def test_unusable_progress_is_one_kind_of_error_of_one_short_line(content):
    with pytest.raises(DocumentError) as caught:
        decode_progress(content)
    message = str(caught.value)
    assert message.isprintable()
    assert 0 < len(message) < 300


def test_progress_keeps_only_what_a_status_can_hold():
    metrics = {
        "loss": 1.5,
        "\x1b[2J": 1.0,
        "a" * 64: 1.0,
        "": 1.0,
        'x"} 1\nfake': 1.0,
        "scoreMath Knowledge": 2.0,
        "\u202eabc": 1,
    }
    report = decode_progress(
        encode_progress(metrics=metrics, eta_seconds=-5.0, seconds={"training": 1e300, "waiting": -1.0}, time=1e200)
    )
    assert report.metrics == {"loss": 1.5, "scoreMath Knowledge": 2.0}
    assert report.eta_seconds == 0.0
    assert report.seconds == {"training": 1e10, "waiting": 0.0}
    assert report.time == 1e10
    many = decode_progress(encode_progress(metrics={f"m{n:03d}": n for n in range(500)}))
    assert sorted(many.metrics) == [f"m{n:03d}" for n in range(MAX_METRICS)]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        pytest.param('{"exit_code":1,"x":' + "[" * 4000, "exit code 1; last log line: [[[", id="nested too deeply"),
        pytest.param('{"exit_code":1,"rank":-5}', "exit code 1; last log line: {", id="negative rank"),
        pytest.param('{"exit_code":1,"superseded_by":' + "9" * 300 + "}", "exit code 1; last", id="large attempt"),
        pytest.param(
            '{"exit_code":1,"message":"<b>\\u0000\\u001b[2J\\nx\\u202ey"}', "<b>[2J xy", id="control characters"
        ),
        pytest.param(
            "Traceback\n\x1b[31mError: \x00\ud800!\r\n",
            "exit code 1; last log line: [31mError: !",
            id="log with escapes",
        ),
        pytest.param("\x00\x1b", "exit code 1", id="log of control characters"),
    ],
)
def test_run_ends_whatever_its_termination_message_is(message, expected):
    world = CoreWorld(spec={"restartPolicy": {"maxRestarts": 0}})
    active = run_to_active_stage(world)
    end = build_terminated(exit_code=1, message=message, finished=world.now)
    world.pods = {n: replace(p, phase="Failed", is_ready=False, terminated=end) for n, p in world.pods.items()}
    world.now += 60
    world.run_until_stable()
    stage = world.stage(active.name)
    assert (stage.state, stage.last_failure.cause) == ("Failed", Cause.CRASH)
    assert stage.last_failure.message.startswith(expected)
    assert stage.last_failure.message.isprintable()


def test_unusable_result_is_read_from_the_storage_by_another_attempt():
    world = CoreWorld()
    active = run_to_active_stage(world)
    world.succeed_stage(active, output="../../etc")
    world.run_until_stable()
    stage = world.stage(active.name)
    assert (stage.attempt, stage.last_failure.cause) == (2, Cause.INFRA)
    assert "the result is missing in the termination message" in stage.last_failure.message


COUNT = st.integers(0, MAX_COUNT)
TEXT = st.text(max_size=40)
NUMBER = st.floats() | st.integers()
CHECKPOINT = st.fixed_dictionaries({"step": COUNT, "path": st.text(max_size=1500) | st.just("demo/c")})
METRICS = st.dictionaries(TEXT | st.sampled_from(["loss", "heldOutLoss"]), NUMBER, max_size=200)
PROGRESS = st.fixed_dictionaries(
    {"attempt": st.just(1), "phase": st.sampled_from(["starting", "running", "evaluating"])},
    optional={
        "step": COUNT,
        "steps": COUNT,
        "tokens": COUNT,
        "lost_steps": COUNT,
        "in_place_restarts": COUNT,
        "eta_seconds": NUMBER,
        "metrics": METRICS,
        "checkpoint": CHECKPOINT,
        "seconds": st.dictionaries(TEXT | st.sampled_from(["training", "waiting"]), NUMBER, max_size=80),
        "time": NUMBER,
    },
)
RESULT = st.fixed_dictionaries(
    {"output": TEXT | st.just("demo/found"), "digest": st.text(max_size=200)},
    optional={"steps": COUNT, "tokens": COUNT, "lost_steps": COUNT, "seconds": NUMBER, "metrics": METRICS},
)
TERMINATION = st.fixed_dictionaries(
    {},
    optional={
        "rank": COUNT,
        "message": st.text(max_size=3000),
        "traceback": st.text(max_size=3000),
        "checkpoint": CHECKPOINT,
        "superseded_by": COUNT,
        "ranks_started": st.booleans(),
    },
)
SCHEMA = jsonschema.Draft202012Validator(build_schema()["properties"]["status"])


def check_status(world: CoreWorld) -> None:
    """Check that the API server would accept the status: its schema, numbers within int64, and clean text."""
    encoded = drop_nulls(encode_status(world.status))
    SCHEMA.validate(encoded)
    assert decode_status(json.loads(json.dumps(encoded))) == world.status
    for value in iterate_values(encoded):
        if isinstance(value, int):
            assert abs(value) < 2**63
        elif isinstance(value, str):
            assert all(line.isprintable() for line in value.split("\n"))
            value.encode()


def iterate_values(value: Any) -> Iterator[Any]:
    """Yield all keys, strings and numbers of nested JSON values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from iterate_values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from iterate_values(inner)
    else:
        yield value


@pytest.mark.fuzz
@pytest.mark.slow
def test_status_keeps_to_the_schema_whatever_workers_report():
    def check(reports: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
        progress, termination, result = reports
        world = CoreWorld(spec={"pricePerGpuHour": "9e99", "workers": {"nodes": 1, "gpusPerNode": 8}})
        active = run_to_active_stage(world)
        for at in (10.0, 20.0):
            with suppress(DocumentError):
                content = json.dumps(progress, ensure_ascii=False).encode(errors="surrogatepass")
                world.progress[active.name, 1] = decode_progress(content)
            world.now += at
            world.run_until_stable()
            check_status(world)
        world.end_worker(0, 1, **termination)
        world.now += 60
        world.reconcile_once()
        check_status(world)
        world.run_until_stable()
        world.succeed_stage(world.stage(active.name), **result)
        world.reconcile_once()
        check_status(world)

    fuzz(st.tuples(PROGRESS, TERMINATION, RESULT), check, examples=30)


JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
SEEDS = [
    encode_progress(step=5, steps=10, metrics={"loss": 1.5}, checkpoint={"step": 5, "path": "demo/c/5"}),
    json.dumps({"exit_code": 0, "result": build_result("curate", metrics={"kept": 5})}).encode(),
    b'{"a":' * 2000 + b"1" + b"}" * 2000,
    gzip.compress(encode_progress(step=1)),
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
    b"\x82\xa7attempt\x01\xa5phase\xa7running",
    b"9" * 5000,
    b"\xff\xfe\x00{",
]
CONTENT = st.one_of(
    st.binary(max_size=300),
    JSON.map(lambda value: json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")),
    PROGRESS.map(lambda value: json.dumps(value).encode()),
    st.builds(lambda content, seed: mutate_bytes(content, Random(seed)), st.sampled_from(SEEDS), st.integers()),
)


def decode_both_ways(content: bytes) -> None:
    """Decode content as an answer of /progress and as a termination message."""
    with suppress(DocumentError):
        decode_progress(content)
    text = content.decode("utf-8", "surrogateescape")
    end = build_terminated(exit_code=1, message=text)
    assert end.report is None or end.message == ""


def measure_peak_bytes(content: bytes) -> int:
    """Return the most memory that decoding some content takes, in bytes, without that of the content itself."""
    tracemalloc.start()
    try:
        decode_both_ways(content)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.fuzz
def test_arbitrary_bytes_are_decoded_or_refused_with_the_one_error():
    def check(content: bytes) -> None:
        assert measure_peak_bytes(content) < 256 * KIB + 64 * len(content)

    fuzz(CONTENT, check, examples=200)
