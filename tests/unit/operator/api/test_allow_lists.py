"""Allow-lists: which images, priority classes, tolerations, service accounts and servers a spec may name."""

from __future__ import annotations

from typing import Any

import pytest

from sailvl_operator.api.allow_lists import ALLOW_ALL, AllowLists, find_disallowed_fields
from sailvl_operator.api.status import StageStatus
from tests.support.builders.operator import build_run

HOSTILE_WORKERS = {
    "gpusPerNode": 0,
    "priorityClassName": "system-node-critical",
    "tolerations": [{"operator": "Exists"}, {"key": "nvidia.com/gpu", "operator": "Exists"}],
    "serviceAccountName": "admin",
}
LISTS = AllowLists(
    images=("registry.example.com",),
    priority_classes=("batch",),
    toleration_keys=("nvidia.com/gpu",),
    service_accounts=("trainer",),
    server_hosts=("judge.team.svc",),
)


def curate(**fields: Any) -> dict[str, Any]:
    return {"name": "curate", "curate": {"sources": [{"format": "procedural", "samples": 1}]} | fields}


def test_empty_lists_allow_everything() -> None:
    run = build_run(image="evil.example/x", workers=HOSTILE_WORKERS, stages=[curate(judge={"server": "http://evil"})])
    assert find_disallowed_fields(run.spec, ALLOW_ALL) == ()


def test_unset_fields_are_allowed() -> None:
    assert find_disallowed_fields(build_run().spec, LISTS) == ()


def test_every_value_outside_of_its_list_is_reported_with_its_field() -> None:
    stage = curate(judge={"server": "http://evil.example"}, caption={"server": "http://judge.team.svc:8000/v1"})
    run = build_run(image="evil.example/x", workers=HOSTILE_WORKERS, stages=[stage | {"workers": HOSTILE_WORKERS}])
    found = find_disallowed_fields(run.spec, LISTS)
    workers = ("priorityClassName", "serviceAccountName", "tolerations[0].key")
    assert [field for field, _ in found] == [
        "spec.image",
        *(f"spec.workers.{field}" for field in workers),
        *(f"spec.stages[0].workers.{field}" for field in workers),
        "spec.stages[0].curate.judge.server",
    ]
    assert found[0][1] == "evil.example/x is not allowed by the operator; it allows registry.example.com"
    assert found[3][1] == "a toleration of every taint is not allowed by the operator; it allows nvidia.com/gpu"


def test_stages_that_have_succeeded_are_not_checked() -> None:
    run = build_run(stages=[curate(judge={"server": "http://evil.example"}) | {"workers": HOSTILE_WORKERS}])
    assert find_disallowed_fields(run.spec, LISTS)
    assert find_disallowed_fields(run.spec, LISTS, [StageStatus(name="curate", state="Succeeded")]) == ()


def test_message_shows_a_part_of_a_long_list() -> None:
    allowed = AllowLists(priority_classes=tuple(f"class-{i}" for i in range(30)))
    [(_, message)] = find_disallowed_fields(build_run(workers=HOSTILE_WORKERS).spec, allowed)
    assert message.endswith("class-8, class-9 and 20 more")


@pytest.mark.parametrize(
    ("entry", "image", "is_allowed"),
    [
        ("registry.example.com", "registry.example.com/x", True),
        ("registry.example.com", "registry.example.com/team/x:1@sha256:00", True),
        ("registry.example.com/", "registry.example.com/x", True),
        ("registry.example.com", "registry.example.com.evil.example/x", False),
        ("registry.example.com", "registry.example.com:5000/x", False),
        ("registry.example.com", "registry.example.com", False),
        ("registry.example.com", "evil.example/registry.example.com/x", False),
        ("registry.example.com", "x", False),
        ("registry.example.com/team", "registry.example.com/team/x", True),
        ("registry.example.com/team", "registry.example.com/team-b/x", False),
        ("registry.example.com/team", "registry.example.com/x", False),
        ("registry.example.com/team/x", "registry.example.com/team/x:1", True),
        ("registry.example.com/team/x", "registry.example.com/team/x@sha256:00", True),
        ("registry.example.com/team/x", "registry.example.com/team/xy:1", False),
        ("localhost:5000", "localhost:5000/x:1", True),
        ("docker.io/library", "python:3.11", True),
        ("docker.io", "index.docker.io/team/x", True),
        ("index.docker.io", "team/x", True),
        ("index.docker.io/team", "docker.io/team/x", True),
        ("[fd00::1]:5000", "[fd00::1]:5000/x", True),
        ("python", "docker.io/library/python", True),
        ("docker.io", "EVIL/x", False),
        ("team", "team.evil.example/x", False),
    ],
)
def test_image_is_allowed_by_registry_or_repository(entry: str, image: str, is_allowed: bool) -> None:
    found = find_disallowed_fields(build_run(image=image).spec, AllowLists(images=(entry,)))
    assert (not found) is is_allowed


@pytest.mark.parametrize(
    ("entry", "server", "is_allowed"),
    [
        ("judge.team.svc", "http://judge.team.svc:8000/v1", True),
        ("judge.team.svc", "https://JUDGE.team.svc", True),
        ("judge.team.svc:8000", "http://judge.team.svc:8000", True),
        ("judge.team.svc:443", "https://judge.team.svc", True),
        ("judge.team.svc:8000", "http://judge.team.svc:8001", False),
        ("judge.team.svc:8000", "http://judge.team.svc", False),
        ("judge.team.svc", "http://judge.team.svc.evil.example", False),
        ("judge.team.svc", "http://evil.example/judge.team.svc", False),
        ("judge.team.svc", "http://evil.example:99999", False),
        ("judge.team.svc", "http://judge.team.svc:99999", False),
        ("[fd00::1]:8000", "http://[fd00::1]:8000", True),
    ],
)
def test_server_is_allowed_by_host(entry: str, server: str, is_allowed: bool) -> None:
    run = build_run(stages=[curate(caption={"server": server})])
    assert (not find_disallowed_fields(run.spec, AllowLists(server_hosts=(entry,)))) is is_allowed


SCHEME = "has a scheme"
HOST = "is not a host"
PORT = "has no port after the colon"
TAG = "has a tag or a digest"
REPOSITORY = "is neither a registry nor a repository"


@pytest.mark.parametrize(
    ("list_name", "entry", "message"),
    [
        ("images", "registry.example.com/*", REPOSITORY),
        ("images", "https://registry.example.com", SCHEME),
        ("images", "a b", REPOSITORY),
        ("images", "registry.example.com/a b", REPOSITORY),
        ("images", "Registry.example.com", HOST),
        ("images", "registry.example.com/Team", REPOSITORY),
        ("images", "registry.example.com:", PORT),
        ("images", "registry.example.com:0", PORT),
        ("images", "registry.example.com:65536", PORT),
        ("images", "registry.example.com:latest", PORT),
        ("images", "python:3.11", PORT),
        ("images", "registry.example.com/team/x:1", TAG),
        ("images", "registry.example.com/team/x@sha256:00", TAG),
        ("images", "registry.example.com//x", REPOSITORY),
        ("images", "/registry.example.com", REPOSITORY),
        ("images", "registry..example.com", HOST),
        ("images", "registry.example.com./x", HOST),
        ("images", "/", REPOSITORY),
        ("images", "r\n", REPOSITORY),
        ("priority_classes", "Batch", "is not a name"),
        ("priority_classes", "batch low", "is not a name"),
        ("priority_classes", "batch\n", "is not a name"),
        ("toleration_keys", "nvidia.com/gpu=true", "is not the key of a taint"),
        ("toleration_keys", "nvidia.com/gpu:NoSchedule", "is not the key of a taint"),
        ("toleration_keys", "nvidia.com/", "is not the key of a taint"),
        ("toleration_keys", "*", "is not the key of a taint"),
        ("service_accounts", "team/trainer", "is not a name"),
        ("service_accounts", "system:serviceaccount:team:trainer", "is not a name"),
        ("server_hosts", "http://judge", SCHEME),
        ("server_hosts", "judge.team.svc/v1", HOST),
        ("server_hosts", "user@judge", HOST),
        ("server_hosts", "judge.team.svc.", HOST),
        ("server_hosts", "*.team.svc", HOST),
        ("server_hosts", "judge:", PORT),
        ("server_hosts", "judge:99999", PORT),
        ("server_hosts", "judge:http", PORT),
        ("server_hosts", "fd00::1", HOST),
    ],
)
def test_entry_that_can_never_match_is_refused(list_name: str, entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^allow-list of {list_name.replace('_', ' ')}: ") as error:
        AllowLists(**{list_name: (entry,)})
    assert f"{entry!r} {message}" in str(error.value)
