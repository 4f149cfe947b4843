"""The start configuration: what the supervisor writes is read, everything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from frontend.config import ConfigError, server_config_from_json
from tests.frontend.deployments import make_config


def raw(**changes: Any) -> dict[str, Any]:
    return asdict(make_config("/run/x")) | changes


def test_a_configuration_is_read_as_it_was_written():
    config = make_config("/run/x", num_api_servers=2, bucket_overrides=[["itl", [0.1, 0.2]]], api_keys=["secret"])
    assert server_config_from_json(json.dumps(asdict(config))) == config
    assert config.bucket_overrides == (("itl", (0.1, 0.2)),)
    assert config.shape(128).max_model_len == 128


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"index": -1}, "index"),
        ({"index": True}, "index"),
        ({"lease_s": "0.6"}, "lease_s"),
        ({"log_stats": 1}, "log_stats"),
        ({"directory": ""}, "directory"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs"),
        ({"max_num_queued_tokens": "9"}, "max_num_queued_tokens"),
        ({"admin_addresses": []}, "admin_addresses"),
        ({"admin_addresses": [["a"]]}, "list"),
        ({"served_model_names": []}, "served_model_names"),
        ({"bucket_overrides": [["itl", ["x"]]]}, "list"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_the_supervisor_would_not_write_is_refused_by_name(changes: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        server_config_from_json(json.dumps(raw(**changes)))


def test_limits_of_the_queue_may_be_left_out():
    fields = raw(max_num_queued_reqs=5)
    del fields["max_num_queued_tokens"]
    config = server_config_from_json(json.dumps(fields))
    assert (config.max_num_queued_reqs, config.max_num_queued_tokens) == (5, None)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "3"])
def test_text_that_is_no_object_is_refused(text: str):
    with pytest.raises(ConfigError):
        server_config_from_json(text)


def test_a_missing_field_is_refused_by_name():
    fields = raw()
    del fields["lease_s"]
    with pytest.raises(ConfigError, match="lease_s"):
        server_config_from_json(json.dumps(fields))
