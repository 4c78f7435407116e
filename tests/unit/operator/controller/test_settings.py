"""Settings from flags and environment variables, and their agreement with the chart."""

from __future__ import annotations

import argparse
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from sailvl_operator.cli.operator import add_arguments
from sailvl_operator.errors import SettingsError
from sailvl_operator.options import OPTIONS, Option, read_settings
from sailvl_operator.settings import OperatorSettings

VALUES = Path(__file__).parents[4] / "helm/sailvl-operator/values.yaml"
NOT_OPTIONS = {
    "defaults.storage",  # differs only in local mode
    "defaults.progress_seconds",  # the controller raises it with the number of runs
}


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


def test_flag_takes_precedence_over_variable_and_variable_over_default():
    environment = {
        "SAILVL_OPERATOR_WORKERS": "3",
        "SAILVL_OPERATOR_METRICS_PORT": "9",
        "SAILVL_OPERATOR_NAMESPACES": "a, b",
    }
    settings = read_settings(parse("--workers", "5", "--leader-election", "false", "--trainer-image", "i"), environment)
    assert (settings.controller.workers, settings.health.port, settings.api.namespaces) == (5, 9, ("a", "b"))
    assert (settings.lease.enabled, settings.defaults.image) == (False, "i")
    assert settings.lease.duration_seconds == OperatorSettings().lease.duration_seconds


def test_peers_are_parsed_without_the_empty_fields_that_the_api_server_removes():
    given = '[{"namespaceSelector": {"matchLabels": {}}, "podSelector": {"matchLabels": {"app": "prometheus"}}}]'
    expected = ({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "prometheus"}}},)
    assert read_settings(parse("--metrics-peers", given), {}).defaults.metrics_peers == expected


def get_default(option: Option) -> object:
    group, _, name = option.target.rpartition(".")
    settings = OperatorSettings()
    return getattr(getattr(settings, group) if group else settings, name)


def test_every_field_is_set_by_one_option():
    groups = {f.name: getattr(OperatorSettings(), f.name) for f in fields(OperatorSettings)}
    targets = [name for name, value in groups.items() if not is_dataclass(value)]
    targets += [f"{group}.{f.name}" for group, value in groups.items() if is_dataclass(value) for f in fields(value)]
    assert sorted([option.target for option in OPTIONS] + [*NOT_OPTIONS]) == sorted(targets)


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.value], ids=lambda option: option.flag)
def test_chart_value_has_the_default_of_its_option(option):
    value = yaml.safe_load(VALUES.read_text())
    for name in option.value.split("."):
        value = value[name]
    assert (tuple(value) if isinstance(value, list) else value) == get_default(option)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(
            ["--workers", "many"],
            "--workers (SAILVL_OPERATOR_WORKERS) is 'many'; set it to a whole number of at least 0",
            id="number",
        ),
        pytest.param(
            ["--metrics-peers", "monitoring"],
            "(SAILVL_OPERATOR_METRICS_PEERS) is 'monitoring'; set it to a JSON list of NetworkPolicyPeers: ",
            id="peers that are not JSON",
        ),
        pytest.param(
            ["--metrics-peers", '[{"ipBlock": {"cidr": "10.0.0.0"}}]'],
            "NetworkPolicyPeers: '10.0.0.0' is not a CIDR such as 10.0.0.0/8 - at `$[0].ipBlock`",
            id="peer that the API server rejects",
        ),
        pytest.param(
            ["--metrics-peers", "[" * 100_000], "set it to a JSON list", id="peers that are nested too deeply"
        ),
        pytest.param(
            ["--allowed-images", " , "], "set it to comma-separated entries, or leave it out", id="list without entries"
        ),
        pytest.param(
            ["--allowed-toleration-keys", "gpu, nvidia.com/gpu=true"],
            "allow-list of toleration keys: 'nvidia.com/gpu=true' is not the key of a taint",
            id="entry that matches nothing",
        ),
        pytest.param(["--workers", "9" * 5000 + "x"], "99…'; set it to a whole number of at least 0", id="long value"),
        pytest.param(["--workers", "-1"], "set it to a whole number of at least 0", id="negative number"),
        pytest.param(["--backoff-seconds", "nan"], "set it to a number of at least 0", id="NaN"),
        pytest.param(["--backoff-seconds", "1e999"], "set it to a number of at least 0", id="infinite number"),
        pytest.param(["--events", "perhaps"], "set it to true or false", id="boolean"),
        pytest.param(
            ["--lease-duration-seconds", "5"],
            "--lease-renew-deadline-seconds is 10; set it to less than --lease-duration-seconds, which is 5",
            id="lease",
        ),
    ],
)
def test_invalid_setting_is_rejected_with_what_to_set_instead(flags, message):
    with pytest.raises(SettingsError) as error:
        read_settings(parse(*flags), {})
    assert message in str(error.value)
