"""Memory that the operator holds for a run: a typical one, a finished one, and the largest that the schema allows."""

from __future__ import annotations

import gc
import json
import re
import tracemalloc
from random import Random
from string import ascii_letters
from typing import Any

import jsonschema
import msgspec
import pytest

from sailvl_operator.api import names, scalars
from sailvl_operator.api.crd import build_schema
from sailvl_operator.api.parse import MAX_SPEC_BYTES, SpecError, parse_spec
from sailvl_operator.api.status import (
    Condition,
    ConditionType,
    Reason,
    StageProgress,
    StageStatus,
    Status,
    decode_status,
    encode_status,
)
from sailvl_operator.api.untrusted import MAX_NAME_LENGTH
from sailvl_operator.cluster.runs import RunStore
from tests.support.builders.operator import SPEC, build_document

KIB = 1024
TIME = "2026-01-01T00:00:00.000Z"
REFERENCES = ("dependsOn", "initFrom", "from")
"""Fields that must name other parts of the spec."""
EXAMPLES = {
    scalars.COUNT: "9T",
    scalars.DECIMAL: "1e-9",
    scalars.QUANTITY: "1Gi",
    scalars.ABSOLUTE: "/",
    scalars.SERVER: "http://a",
}
"""Shortest values of the patterns that a single letter doesn't match."""


def fill(schema: dict[str, Any], number: int = 0, *, is_long: bool = False) -> Any:
    """Build a value with every field and as many items as the schema allows, and short or long strings."""
    if "enum" in schema:
        return max(schema["enum"], key=len)
    match schema["type"]:
        case "object" if "properties" in schema:
            fields = {k: v for k, v in schema["properties"].items() if k not in (*REFERENCES, "stages")}
            return {name: fill(field, number, is_long=is_long) for name, field in fields.items()}
        case "object":
            inner = schema["additionalProperties"]
            return {f"k{n}": fill(inner, n, is_long=is_long) for n in range(schema["maxProperties"])}
        case "array":
            items = [fill(schema["items"], n, is_long=is_long) for n in range(schema["maxItems"])]
            return items if isinstance(items[0], dict) else sorted(set(items))
        case "string":
            text = EXAMPLES.get(schema.get("pattern", ""), f"a{number}")
            return text.ljust(schema["maxLength"], "a") if is_long and text[0] in "/ah" else text
    return schema["type"] == "boolean" or schema.get("maximum", 2**31)


def build_raw(number: int, spec: dict[str, Any], status: Status) -> dict[str, Any]:
    """Build a run as kopf passes it on."""
    document = build_document()
    document["metadata"] |= {
        "name": f"demo-{number}",
        "uid": f"0b5e7f8c-0000-4000-8000-{number:012d}",
        "resourceVersion": str(number + 1),
        "generation": 1,
        "creationTimestamp": TIME,
        "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {"x" * 1000: {}}}}],
    }
    return json.loads(json.dumps(document | {"spec": spec, "status": encode_status(status)}))


def build_status(*, is_finished: bool) -> Status:
    """Build the status of a run whose four stages have succeeded or run."""
    stages = [
        StageStatus(
            name=stage["name"],
            state="Succeeded" if is_finished else "Running",
            attempt=1,
            digest="0123456789abcdef" * 4,
            start_time=TIME,
            output=f"demo/{stage['name']}-0123456789ab",
            progress=StageProgress(step=100, steps=100, tokens=10_000),
            metrics={"heldOutLoss": "1.25", "loss": "1.5", "tokensPerSecond": "1000"},
        )
        for stage in SPEC["stages"]
    ]
    conditions = [
        Condition(
            type=type_,
            status="True" if type_ == ConditionType.SUCCEEDED and is_finished else "False",
            reason=Reason.COMPLETED,
            message="all 4 stages succeeded",
            last_transition_time=TIME,
            observed_generation=1,
        )
        for type_ in ConditionType
    ]
    return Status(stages=stages, conditions=conditions, start_time=TIME)


def measure_held_kib(spec: dict[str, Any], status: Status, *, runs: int = 10, is_read: bool = True) -> float:
    """Return the memory in KiB that a store holds for each of several runs, once they have been read or before."""
    store = RunStore()
    store.put(build_raw(10**6, spec, status))
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(runs):
            store.put(build_raw(number, spec, status))
            if is_read:
                store.get(("team", f"demo-{number}"))
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / runs / KIB


def build_largest_spec(*, is_long: bool, max_bytes: int) -> dict[str, Any]:
    """Build the spec with the most stages that still has at most `max_bytes` as JSON."""
    schema = build_schema()["properties"]["spec"]
    spec, stage = fill(schema, is_long=is_long), fill(schema["properties"]["stages"]["items"], is_long=is_long)
    size, stage_size = (len(msgspec.json.encode(part)) for part in (spec, stage))
    number = min(schema["properties"]["stages"]["maxItems"], (max_bytes - size - 128) // (stage_size + 1))
    return spec | {"stages": [stage | {"name": f"s{n}"} for n in range(number)]}


WIDE_LETTERS = [chr(code) for code in range(0x1F300, 0x1F5FF)]
"""Printable characters of which each takes four bytes, in JSON and in memory."""


def fill_status(schema: dict[str, Any], random: Random) -> Any:
    """Build a value with every field, as many items as the schema allows and the longest strings, which a worker can
    choose so that they can't be compressed."""
    if "enum" in schema:
        return max(schema["enum"], key=len)
    match schema["type"]:
        case "object" if "properties" in schema:
            return {name: fill_status(field, random) for name, field in schema["properties"].items()}
        case "object":
            names = ("".join(random.choices(ascii_letters, k=MAX_NAME_LENGTH)) for _ in range(schema["maxProperties"]))
            return {name: fill_status(schema["additionalProperties"], random) for name in names}
        case "array":
            return [fill_status(schema["items"], random) for _ in range(schema["maxItems"])]
        case "string":
            text = "".join(random.choices(WIDE_LETTERS, k=schema.get("maxLength", 16)))
            return next(example for example in (text, TIME, "99.00", "1e-9") if is_valid(example, schema))
    return schema["type"] == "boolean" or schema.get("maximum", 2**31) - random.randrange(10**6)


def is_valid(value: object, schema: dict[str, Any]) -> bool:
    return "pattern" not in schema or re.fullmatch(schema["pattern"], str(value)) is not None


def build_largest_status(*, is_finished: bool) -> Status:
    """Build a status at the limit of its schema."""
    status = fill_status(build_schema()["properties"]["status"], Random(0))
    for number, condition in enumerate(status["conditions"]):
        is_final = is_finished and number == 0
        condition |= {"type": "Failed" if is_final else f"Type{number}", "status": "True" if is_final else "False"}
    return decode_status(status)


@pytest.mark.slow
def test_typical_runs_are_small() -> None:
    assert measure_held_kib(SPEC, build_status(is_finished=False)) < 24
    assert measure_held_kib(SPEC, build_status(is_finished=False), is_read=False) < 6
    assert measure_held_kib(SPEC, build_status(is_finished=True)) < 3


@pytest.mark.parametrize("is_long", [False, True], ids=["many short values", "long values"])
@pytest.mark.slow
def test_memory_of_the_largest_spec_is_known(is_long: bool) -> None:
    spec = build_largest_spec(is_long=is_long, max_bytes=MAX_SPEC_BYTES)
    assert spec["stages"], "one stage with every field at its limit fits"
    assert parse_spec(spec).stages
    assert measure_held_kib(spec, Status(), runs=2) < 1024
    assert measure_held_kib(spec, Status(), runs=2, is_read=False) < 260, "a standby holds little more than the JSON"


@pytest.mark.parametrize(("is_finished", "max_kib"), [(False, 3072), (True, 1024)], ids=["active", "finished"])
@pytest.mark.slow
def test_memory_of_the_largest_spec_and_status_is_known(is_finished: bool, max_kib: int) -> None:
    spec, status = (
        build_largest_spec(is_long=False, max_bytes=MAX_SPEC_BYTES),
        build_largest_status(is_finished=is_finished),
    )
    jsonschema.validate(encode_status(status), build_schema()["properties"]["status"])
    size = len(msgspec.json.encode(encode_status(status)))
    assert 2**20 < size < 1.5 * 2**20, "the API server stores up to 1.5 MiB of an object"
    held = measure_held_kib(spec, status, runs=2)
    assert max_kib / 2 < held < max_kib


@pytest.mark.slow
def test_largest_spec_of_the_schema_is_refused_and_not_held() -> None:
    spec = build_largest_spec(is_long=True, max_bytes=10**9)
    with pytest.raises(SpecError, match=rf"^spec: has \d{{7}} bytes as JSON, and may have at most {MAX_SPEC_BYTES}; "):
        parse_spec(spec)
    assert measure_held_kib(spec, build_status(is_finished=True), runs=1) < 32


def test_full_environment_and_all_stages_fit() -> None:
    env = [{"name": f"{names.CONTAINER.upper()}_{n}", "value": "v" * 1024} for n in range(64)]
    stages = [stage | {"name": f"stage-{n}"} for n in range(31) for stage in SPEC["stages"][2:3]]
    spec = SPEC | {"workers": {"nodes": 2, "env": env}, "stages": [SPEC["stages"][0], *stages]}
    assert len(parse_spec(spec).stages) == 32


def test_finished_run_is_read_as_it_was_stored() -> None:
    raw = build_raw(1, SPEC, build_status(is_finished=True))
    raw["metadata"]["annotations"] = {names.ANNOTATION_RESTART: "curate", "other": "x" * 10_000}
    finished, active = RunStore(), RunStore()
    finished.put(raw)
    active.put(raw | {"status": {}})
    key = (raw["metadata"]["namespace"], raw["metadata"]["name"])
    packed, parsed = finished.get(key), active.get(key)
    assert packed is not None
    assert parsed is not None
    assert (packed.run.spec, packed.planned) == (parsed.run.spec, parsed.planned)
    assert (packed.run.status, packed.run.restart_stage) == (raw["status"], "curate")
    assert packed.run.resource_version == raw["metadata"]["resourceVersion"]
    assert finished.get_unfinished(key) is None
    assert active.get_unfinished(key) is not None
    [(*_, read_status)] = finished.statuses()
    assert read_status().is_true(ConditionType.SUCCEEDED)


def test_run_that_is_resumed_is_parsed_again() -> None:
    store = RunStore()
    store.put(build_raw(1, SPEC, build_status(is_finished=True)))
    raw = build_raw(1, SPEC, build_status(is_finished=False))
    raw["metadata"]["resourceVersion"] = "9"
    assert store.put(raw)
    entry = store.get_unfinished(("team", "demo-1"))
    assert entry is not None
    assert len(entry.planned) == 4
