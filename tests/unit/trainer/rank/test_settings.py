"""The environment of a worker: defaults, ports of workers on one machine, and refused values."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailvl_trainer.contract import (
    Env,
)
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.settings import Settings, read_settings


def test_all_settings_but_the_stage_file_have_defaults() -> None:
    assert read_settings({Env.STAGE_FILE: "/s.json"}) == Settings(
        stage_file=Path("/s.json"),
        nodes=1,
        node_rank=0,
        node_name="",
        processes_per_node=1,
        device="cpu",
        rendezvous_host="localhost",
        rendezvous_port=29500,
        metrics_port=9400,
        in_place_restarts=0,
        grace_seconds=30,
        stall_timeout_seconds=0,
        termination_log=Path("/dev/termination-log"),
        scratch=Path("/tmp/sailvl"),
    )


def test_offset_is_added_to_the_metrics_port() -> None:
    environment = {Env.STAGE_FILE: "/s.json", Env.METRICS_PORT: "9000", Env.METRICS_PORT_OFFSET: "3"}
    assert read_settings(environment).metrics_port == 9003


INVALID_ENVIRONMENTS = [
    pytest.param({Env.STAGE_FILE: ""}, "SAILVL_STAGE_FILE is not set; set it to the path", id="no stage file"),
    pytest.param({Env.NODES: "two"}, "SAILVL_NODES is 'two'; set a whole number", id="not a number"),
    pytest.param({Env.NODES: "0"}, "SAILVL_NODES is 0; set at least 1", id="no worker"),
    pytest.param(
        {Env.NODES: "2", Env.NODE_RANK: "2", Env.RENDEZVOUS_SECRET: "1a2b"},
        "SAILVL_NODE_RANK is 2; set a number from 0 to 1",
        id="index too high",
    ),
    pytest.param(
        {Env.NODES: "2"},
        "SAILVL_RENDEZVOUS_SECRET is not set; set it to the same random text for all 2 workers",
        id="no secret",
    ),
    pytest.param({Env.NODES: "2", Env.RENDEZVOUS_SECRET: ""}, "SAILVL_RENDEZVOUS_SECRET is not set", id="empty secret"),
    pytest.param({Env.PROCESSES_PER_NODE: "0"}, "SAILVL_PROCESSES_PER_NODE is 0", id="no rank"),
    pytest.param({Env.DEVICE: "tpu"}, "SAILVL_DEVICE is 'tpu'; set cuda or cpu", id="unknown device"),
    pytest.param({Env.GRACE_SECONDS: "-1"}, "SAILVL_GRACE_SECONDS is -1; set at least 0", id="negative"),
]


@pytest.mark.parametrize(("environment", "message"), INVALID_ENVIRONMENTS)
def test_invalid_variable_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_settings({Env.STAGE_FILE: "/s.json"} | environment)
    assert message in str(error.value)
